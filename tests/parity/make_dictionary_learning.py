"""Fixtures of dictionary_learning 0.1.0: its six kinds of dictionary, by their own classes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from recording import D, F, fill, inputs, record, start, stub

SITE = Path(importlib.util.find_spec("dictionary_learning").origin).parent
stub("dictionary_learning", SITE)
stub("dictionary_learning.trainers", SITE / "trainers")
stub("dictionary_learning.config", DEBUG=False)

from dictionary_learning.dictionary import (  # noqa: E402
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

KINDS = {
    "standard": (AutoEncoder, {}),
    "new": (AutoEncoderNew, {}),
    "gated": (GatedAutoEncoder, {}),
    "jumprelu": (JumpReluAutoEncoder, {}),
    "topk": (AutoEncoderTopK, {"k": 12}),
    "batchtopk": (BatchTopKSAE, {"k": 12}),
    "matryoshka": (MatryoshkaBatchTopKSAE, {"k": 12, "group_sizes": [8, 16, 24]}),
}

for kind, (cls, options) in KINDS.items():
    torch.manual_seed(0)  # the peer checks itself on random inputs while it loads
    coder = cls(D, F, **options).eval()
    fill(coder, seed=11)
    with torch.no_grad():
        if kind == "jumprelu":
            coder.threshold.copy_(torch.linspace(0.2, 1.5, F))
        if kind in ("topk", "batchtopk", "matryoshka"):
            coder.threshold.fill_(0.9)
            (coder.b_enc if kind == "matryoshka" else coder.encoder.bias).sub_(1.0)
        if kind == "gated":
            coder.r_mag.copy_(torch.linspace(-0.5, 0.7, F))
            coder.mag_bias.sub_(0.3)
    folder = start("dictionary_learning", kind)
    (folder / "trainer_0").mkdir()
    file = folder / "trainer_0" / "ae.pt"
    torch.save(coder.state_dict(), file)
    trainer = {
        "dict_class": cls.__name__, "lr": 0.0001, "steps": 1000, "seed": 0, "activation_dim": D, "dict_size": F,
        "device": "cpu", "layer": 3, "lm_name": "gpt2", "wandb_name": kind, "submodule_name": "resid_post_layer_3",
    }  # fmt: skip
    buffer = {"d_submodule": D, "io": "out", "n_ctxs": 100, "ctx_len": 128, "device": "cpu"}
    extra = {"k": options["k"]} if "k" in options else {}
    (folder / "trainer_0" / "config.json").write_text(
        json.dumps({"trainer": trainer | extra, "buffer": buffer}, indent=4)
    )
    again = cls.from_pretrained(file)
    x = inputs()
    with torch.no_grad():
        acts = again.encode(x)
        recon = again.decode(acts)
    if kind == "topk":
        assert ((acts > 0).sum(-1) < 12).any()
    elif kind not in ("standard", "new"):
        assert (acts > 0).any()
    record(folder, {"x": x, "acts": acts, "recon": recon}, "dictionary-learning", "0.1.0",
           [{"place": "trainer_0", "name": "", "prefix": ""}])  # fmt: skip
