"""Coders of ours in each peer's format, for the peers to read: `python write_for_peers.py OUT`, in the project's venv.

Then, each with the peer's interpreter, `check_openai_reads_ours.py OUT CHECKOUT` and its siblings. Run by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from formats.writing import D, inputs, make, run  # noqa: E402
from unmix.coder.config import BatchTopK, Gated, GroupMax, JumpReLU, Normalise, ReLU, TopK  # noqa: E402
from unmix.formats import convert  # noqa: E402

LAYERED = Normalise(kind="layer_norm")
SHIFTED = Normalise(kind="layer_norm", eps=0.3, eps_back=True)
SCALED = {"pre_bias": "own", "input_scale": 0.7, "output_scale": 1.3}
FIXED = {"normalise": Normalise(kind="standardise"), "pre_bias": "none"}
CROSS = {"reads": ("blocks.1.resid_post", "blocks.2.resid_post"), "d_in": 2 * D}
CASES = {
    "openai": {
        "relu": make(ReLU(), **SCALED), "topk": make(TopK(k=3), normalise=LAYERED),
        "signed": make(TopK(k=3, relu="none"), normalise=LAYERED), "fixed": make(ReLU(), **FIXED),
    },
    "sparsify": {
        "topk": make(TopK(k=3), **SCALED), "groupmax": make(GroupMax(k=4)), "fixed": make(TopK(k=3), **FIXED),
        "transcoder": make(TopK(k=3), writes=("blocks.2.mlp_out",), skip=True),
        "signed": make(TopK(k=3, relu="none", magnitude=True), n_latents=3 * D),
    },
    "opensae": {
        "shifted": make(TopK(k=3), normalise=SHIFTED), "raw": make(TopK(k=3), **SCALED),
        "unrestored": make(TopK(k=3), normalise=Normalise(kind="layer_norm", restore=False)),
    },
    "e2e_sae": {"relu": make(ReLU()), "scaled": make(ReLU(), **SCALED), "fixed": make(ReLU(), **FIXED)},
    "dictionary_learning": {
        "new": make(ReLU(), **SCALED), "gated": make(Gated(), **FIXED), "topk": make(TopK(k=3), **SCALED),
        "jumprelu": make(JumpReLU(), gate_space="decoder_norm"), "batchtopk": make(BatchTopK(k=3)),
        "standard": make(ReLU()),
    },
    "dictionary_learning_crosscoder": {
        "relu": make(ReLU(), **CROSS, **SCALED), "fixed": make(BatchTopK(k=3), **CROSS, **FIXED),
        "sum": make(BatchTopK(k=3), **CROSS, gate_space="decoder_norm_sum"),
        "norm": make(BatchTopK(k=3), **CROSS, gate_space="decoder_norm"),
        "statistics": make(BatchTopK(k=3), **CROSS, normalise=Normalise(kind="standardise")),
    },
}  # fmt: skip


def main(out: Path) -> None:
    """Write every case with what our own coder computes."""
    with torch.no_grad():
        standard = CASES["dictionary_learning"]["standard"]
        standard.W_dec.copy_(standard.dictionary)
        scale = CASES["dictionary_learning_crosscoder"]["statistics"].norm_scale
        scale.copy_(torch.tensor([0.5, 2.0]).repeat_interleave(D))
    for format, cases in CASES.items():
        for kind, coder in cases.items():
            folder = out / format / kind
            folder.mkdir(parents=True)
            convert(coder, folder / "written", format)
            x = inputs(d=coder.config.d_in)
            acts, recon = run(coder, x)
            save_file({"x": x, "acts": acts, "recon": recon}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
