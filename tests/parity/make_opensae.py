"""Fixtures of THU-KEG's OpenSAE, by its own code.

`python make_opensae.py CHECKOUT`, where CHECKOUT is the peer's repository at 978f094. Its decoder asks for a CUDA
device and its config for a `jumprelu_theta` it has not yet set: both are stepped around here. Recorded with
transformers 4.46.3, of the time of its files: with 5.x it writes `dtype` and cannot read its own configs.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from recording import D, F, dense, fill, inputs, record, start, stub

CHECKOUT = Path(sys.argv[1]) / "src" / "opensae"
stub("opensae", CHECKOUT)
torch.cuda.device = lambda *_: contextlib.nullcontext()

from opensae.saes.open_sae.configuration_open_sae import OpenSaeConfig  # noqa: E402
from opensae.saes.open_sae.modeling_open_sae import OpenSae  # noqa: E402
from opensae.sparse_activations import JumpReLU  # noqa: E402

COMMIT = "978f094a7e2c6e0b09566fa35d6ead42110d5a35"
KINDS = {
    "sharded": {"normalize_shift_back": False},
    "shift_back": {"normalize_shift_back": True, "multi_topk_multiplier": None},
    "jumprelu": {"normalize_shift_back": False},
    "raw_input": {"input_normalize": False, "input_hookpoint": "layers.7", "output_hookpoint": "layers.7"},
    "trainer": {"normalize_shift_back": False},
}
THETA = 1.0

for kind, options in KINDS.items():
    settings = {
        "hidden_size": D, "feature_size": F, "k": 9, "decoder_impl": "torch", "torch_dtype": "float32",
        "input_hookpoint": "layers.25", "output_hookpoint": "layers.25",
    }  # fmt: skip
    config = OpenSaeConfig(**settings | options)
    coder = OpenSae(config).eval()
    fill(coder, seed=7)
    with torch.no_grad():
        coder.encoder.bias.sub_(1.2)
    if kind == "jumprelu":
        config.activation, config.jumprelu_theta = "jumprelu", THETA
        coder.sparse_activation = JumpReLU(THETA)
    folder = start("opensae", kind)
    place = "layer_25"
    if kind == "trainer":
        place = "saes/layers.25/iter_0000200.pt"
        (folder / place).parent.mkdir(parents=True)
        torch.save(coder.state_dict(), folder / place)
        (folder / "saes" / "layers.25" / "latest_checkpoint.txt").write_text("200")
        config.save_pretrained(folder / "saes" / "layers.25")
    else:
        coder.save_pretrained(folder / place, max_shard_size="5KB" if kind == "sharded" else "1GB")
    x = inputs()
    with torch.no_grad():
        out = coder.encode(x)
        acts = dense(out.sparse_feature_activations, out.sparse_feature_indices)
        recon = coder.decode(
            out.sparse_feature_indices, out.sparse_feature_activations, out.input_mean, out.input_std
        ).sae_output
    if kind == "jumprelu":
        above = (out.sparse_feature_activations > THETA).sum(-1)
        assert (above == 0).any() and (above > 1).any() and ((acts > 0) & (acts < THETA)).any()
    else:
        assert ((acts > 0).sum(-1) < 9).any()
    record(folder, {"x": x, "acts": acts, "recon": recon}, "OpenSAE", COMMIT,
           [{"place": place, "name": "", "prefix": ""}])  # fmt: skip
