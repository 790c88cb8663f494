"""Records ckkissane's model-diffing crosscoders: `make_ckkissane.py CHECKOUT`, the peer's checkout at e221e8d."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import einops
import torch
from scopes_recording import ROWS, D, F, Weights, fresh, record

# Its `utils` downloads models and data sets when it is imported; the class needs these names from it.
stub = types.ModuleType("utils")
stub.__dict__.update(torch=torch, einops=einops, json=json, Path=Path)
sys.modules["utils"] = stub
sys.path.append(sys.argv[1])

from crosscoder import CrossCoder  # noqa: E402


@torch.no_grad()
def main() -> None:
    """One kind."""
    draw, out = Weights(61), fresh("ckkissane", "gemma")
    cfg = {
        "seed": 51, "batch_size": 2048, "buffer_mult": 512, "lr": 5e-5, "num_tokens": 400_000_000, "l1_coeff": 2,
        "beta1": 0.9, "beta2": 0.999, "d_in": D, "dict_size": F, "seq_len": 1024, "enc_dtype": "fp32",
        "model_name": "gemma-2-2b", "site": "resid_pre", "device": "cpu", "model_batch_size": 4, "log_every": 100,
        "save_every": 30_000, "dec_init_norm": 0.08, "hook_point": "blocks.14.hook_resid_pre",
    }  # fmt: skip
    theirs = CrossCoder(cfg)
    for parameter in theirs.parameters():
        parameter.copy_(draw.normal(*parameter.shape, scale=0.3))
    place = out / "blocks.14.hook_resid_pre"
    place.mkdir()
    torch.save(theirs.state_dict(), place / "cc_weights.pt")
    (place / "cfg.json").write_text(json.dumps(cfg))
    x = draw.normal(ROWS, 2, D, scale=1.5)
    acts = theirs.encode(x)
    # Both models' activations side by side, as one input.
    expected = {"x": x.flatten(1), "acts": acts, "recon": theirs.decode(acts).flatten(1)}
    peer = "crosscoder-model-diff-replication"
    record(out, place.name, expected, peer, version="e221e8d", transcribed=False)


if __name__ == "__main__":
    main()
