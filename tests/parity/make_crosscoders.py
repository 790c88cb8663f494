"""Fixtures of the crosscoders in science-of-finetuning's fork of dictionary_learning, by their own classes.

`python make_crosscoders.py CHECKOUT`, where CHECKOUT is the fork at 173f7fa.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from recording import D, F, fill, inputs, record, start, stub

CHECKOUT = Path(sys.argv[1]) / "dictionary_learning"
stub("dictionary_learning", CHECKOUT)
stub("datasets", load_dataset=None)
stub("zstandard")

from dictionary_learning.dictionary import BatchTopKCrossCoder, BatchTopKSAE, CodeNormalization, CrossCoder  # noqa: E402

COMMIT = "173f7facbe80f16c837e7b5e4dca78a50c000115"
L = 2
MEAN = torch.linspace(-1, 1, L * D).reshape(L, D)
STD = torch.linspace(0.5, 2, L * D).reshape(L, D)
ONE_HOOK = {"activation_mean": MEAN[0], "activation_std": STD[0], "target_rms": 2.0}
STATISTICS = {"activation_mean": MEAN, "activation_std": STD, "target_rms": 3.0}
KINDS = {
    "relu": (CrossCoder, {}, "pt"),
    "relu_compiled": (CrossCoder, {"code_normalization": "NONE"}, "pt"),
    "relu_statistics": (CrossCoder, {**STATISTICS, "code_normalization": "SAE"}, "hub"),
    "batchtopk_1": (BatchTopKCrossCoder, {"code_normalization": "CROSSCODER"}, "pt"),
    "batchtopk_2": (BatchTopKCrossCoder, {**STATISTICS, "code_normalization": "SAE"}, "pt"),
    "batchtopk_3": (BatchTopKCrossCoder, {"code_normalization": "MIXED"}, "pt"),
    "batchtopk_4": (BatchTopKCrossCoder, {"code_normalization": "NONE"}, "hub"),
    "batchtopk_5": (BatchTopKCrossCoder, {"code_normalization": "DECOUPLED"}, "pt"),
    "batchtopk_statistics": (BatchTopKSAE, ONE_HOOK, "pt"),
}
THRESHOLDS = {"batchtopk_1": 3.5, "batchtopk_2": 2.2, "batchtopk_3": 2.4, "batchtopk_4": 1.1}
THRESHOLDS["batchtopk_statistics"] = 0.8

for kind, (cls, options, form) in KINDS.items():
    crossed = issubclass(cls, CrossCoder)
    size = {"num_layers": L} if crossed else {}
    more = {"k": 12} if cls is not CrossCoder else {}
    coder = cls(D, F, **size, **more, **options).eval()
    fill(coder, seed=13)
    with torch.no_grad():
        if kind == "batchtopk_5":
            coder.threshold.copy_(torch.tensor([1.4, 2.0]))
        elif kind in THRESHOLDS:
            coder.threshold.fill_(THRESHOLDS[kind])
    folder = start("dictionary_learning_crosscoder", kind) if crossed else start("dictionary_learning", kind)
    place = "model_final.pt"
    state = coder.state_dict()
    if kind == "relu":
        state = {k: v for k, v in state.items() if k in dict(coder.named_parameters())}  # the earliest files
    if kind == "relu_compiled":
        state = {f"_orig_mod.{k}": v for k, v in state.items()}
    if form == "hub":
        place = "."
        coder.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        torch.save(state, folder / place)
        trainer = {"dict_class": cls.__name__, "activation_dim": D, "dict_size": F, "layer": 13, "lm_name": "a-b"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 1024}}))
    x = inputs(L) if crossed else inputs()
    with torch.no_grad():
        acts = coder.encode(x)
        recon = coder.decode(acts)
    assert (acts > 0).any() and (acts == 0).any()
    flat = {"x": x.reshape(len(x), -1), "acts": acts.reshape(len(x), -1), "recon": recon.reshape(len(x), -1)}
    record(folder, flat, "science-of-finetuning/dictionary_learning", COMMIT,
           [{"place": place, "name": "", "prefix": ""}])  # fmt: skip
assert [n.value for n in CodeNormalization] == [1, 2, 3, 4, 5]
