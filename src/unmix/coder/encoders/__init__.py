"""Encoders that are not one affine map, one small file each; `ENCODERS` in `coder.encoder` maps kinds to them."""
