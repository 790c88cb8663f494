"""Fixtures of EleutherAI's sparsify 1.3.3, and of `signed` coders by the code of July 2024, when there were some.

`python make_sparsify.py OLD_CHECKOUT`, where OLD_CHECKOUT is the peer's repository at a81d890.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from recording import D, F, dense, fill, inputs, record, start, stub

OLD = Path(sys.argv[1])
SITE = Path(importlib.util.find_spec("sparsify").origin).parent
stub("transformers", PreTrainedModel=object)
stub("accelerate")
stub("accelerate.utils", send_to_device=None)
stub("sparsify", SITE)
stub("sae", OLD / "sae")

from sae.config import SaeConfig  # noqa: E402
from sae.sae import Sae  # noqa: E402
from sparsify.config import SparseCoderConfig  # noqa: E402
from sparsify.sparse_coder import SparseCoder  # noqa: E402

OLD_COMMIT = "a81d89004ca9dec5c6ace0ed425a03ef6c265f44"
NEW = {
    "topk": ("layers.10", SparseCoderConfig(num_latents=F, k=12)),
    "groupmax": ("layers.3", SparseCoderConfig(num_latents=F, k=12, activation="groupmax")),
    "multi_topk": ("layers.4", SparseCoderConfig(expansion_factor=3, k=6, multi_topk=True)),
    "transcoder_skip": (
        "layers.29.mlp", SparseCoderConfig(num_latents=F, k=12, transcode=True, skip_connection=True),
    ),
}  # fmt: skip
LEGACY = {
    "legacy": ("layer_5", SaeConfig(expansion_factor=3, k=12)),
    "signed": ("layers.2", SaeConfig(expansion_factor=3, k=12, signed=True)),
}

for kind, (hook, cfg) in {**NEW, **LEGACY}.items():
    coder = (Sae if kind in LEGACY else SparseCoder)(D, cfg).eval()
    fill(coder, seed=5)
    with torch.no_grad():
        coder.encoder.bias.sub_(1.2)
    folder = start("sparsify", kind)
    coder.save_to_disk(folder / hook)
    again = type(coder).load_from_disk(folder / hook)
    x = inputs()
    with torch.no_grad():
        encoded = again.encode(x)
        acts = dense(encoded.top_acts, encoded.top_indices)
        decoded = again.decode(encoded.top_acts, encoded.top_indices)
        # With multi_topk the forward pass gives back its pass over 4k latents' codes, but this output.
        recon = again(x).sae_out if not cfg.to_dict().get("multi_topk") else decoded
    if kind in ("topk", "legacy", "transcoder_skip"):
        assert ((acts > 0).sum(-1) < 12).any()
    if kind == "signed":
        assert (acts < 0).any()
    version = OLD_COMMIT if kind in LEGACY else "1.3.3"
    record(folder, {"x": x, "acts": acts, "recon": recon, "decoded": decoded}, "eai-sparsify", version,
           [{"place": hook, "name": "", "prefix": ""}])  # fmt: skip
