"""Whether SAELens itself reads the folders that unmix writes, and computes the same. Run by hand, in two steps:

    python tests/parity/check_sae_lens_reads_ours.py write FOLDER     # where unmix is installed
    python tests/parity/check_sae_lens_reads_ours.py read FOLDER      # where sae-lens==6.54.12 is installed

The first writes every recorded kind of `sae_lens/` and coders of other shapes in the `sae_lens` format, with inputs,
the written coder's codes and the original coder's outputs. The second loads each with the peer and compares to 1e-5.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parent / "sae_lens"
D, F, OUT = 16, 48, 12


def others() -> dict[str, Any]:
    """Coders that SAELens can only say after a fold."""
    from unmix.coder.config import BatchTopK, CoderConfig, Gated, JumpReLU, Normalise, ReLU, TopK

    one: dict[str, Any] = {"reads": ("blocks.2.resid_post",), "d_in": D, "n_latents": F}
    two = one | {"writes": ("blocks.2.mlp_out_post",), "d_out": OUT, "pre_bias": "none"}
    scales = {"input_scale": 0.7, "output_scale": 1.3}
    fixed = {"normalise": Normalise(kind="standardise")}
    return {
        "own_bias": CoderConfig(**one, activation=ReLU(), pre_bias="own"),
        "gated_scaled": CoderConfig(**one, **scales, activation=Gated()),
        "gated_standardised": CoderConfig(**one, **fixed, activation=Gated(), pre_bias="own"),
        "topk_decoder_norm": CoderConfig(**one, activation=TopK(k=5), gate_space="decoder_norm"),
        "topk_own_gate": CoderConfig(**one, **scales, activation=TopK(k=5), gate_space="own"),
        "jumprelu_decoder_norm": CoderConfig(**one, **scales, activation=JumpReLU(), gate_space="decoder_norm"),
        "batchtopk_decoder_norm": CoderConfig(**one, activation=BatchTopK(k=4), gate_space="decoder_norm"),
        "transcoder_own": CoderConfig(**two | {"pre_bias": "own"}, **scales, activation=ReLU()),
        "skip_scaled": CoderConfig(**two, **scales, activation=JumpReLU(), skip=True),
        "transcoder_normed": CoderConfig(
            **two, activation=ReLU(), normalise=Normalise(kind="constant_norm", restore=False)
        ),
        "z_of_all_heads": CoderConfig(**one | {"reads": ("blocks.2.z",)}, activation=ReLU()),
    }


def write(folder: Path) -> None:
    """The first step."""
    from unmix.coder.sparse_coder import SparseCoder
    from unmix.formats import convert, load, load_all

    coders = {f"{p.name}.{i}": c for p in sorted(ROOT.iterdir()) for i, c in enumerate(load_all(p).values())}
    rng = torch.Generator().manual_seed(3)
    for name, config in others().items():
        coder = coders[name] = SparseCoder(config).eval()
        for key, p in coder.named_parameters():
            value = torch.randn(p.shape, generator=rng)
            p.data.copy_(value.abs() + 0.1 if key in ("threshold", "gate_scale", "norm_scale") else value / 4)
    for name, coder in coders.items():
        convert(coder, folder / name, "sae_lens")
        again = load(folder / name)
        shape = (2, 5, D) if "temporal" in name else (8, D)
        x = torch.randn(shape, generator=rng) * 2
        with torch.no_grad():
            told = {"x": x, "acts": again.encode(x).dense(), "out": coder(x).reconstruction}
        save_file({k: v.contiguous() for k, v in told.items()}, folder / name / "ours.safetensors")
    sys.stdout.write(f"wrote {len(coders)} coders\n")


def read(folder: Path) -> None:
    """The second step."""
    from sae_lens import SAE

    worst = ("", 0.0)
    for place in sorted(folder.iterdir()):
        sae, told = SAE.load_from_disk(place).eval(), load_file(place / "ours.safetensors")
        x = told["x"]
        heads = sae.cfg.reshape_activations == "hook_z"
        given = x.unflatten(-1, (4, -1)) if heads else x
        with torch.no_grad():
            acts, out = sae.encode(given), sae(given)
        out = out.flatten(-2) if heads else out
        error = max(relative(acts, told["acts"]), relative(out, told["out"]))
        assert sae.cfg.metadata.hook_name is not None, place.name
        worst = max(worst, (place.name, error), key=lambda pair: pair[1])
        sys.stdout.write(f"{place.name:40} {type(sae).__name__:24} {error:.1e}\n")
    sys.stdout.write(f"{len(list(folder.iterdir()))} folders; largest relative error {worst[1]:.1e} ({worst[0]})\n")
    sys.exit(worst[1] > 1e-5)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
