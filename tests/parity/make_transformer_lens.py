"""What TransformerLens shows at its hooks, on the weights of our tiny models.

`PYTHONPATH=tests python tests/parity/make_transformer_lens.py`, once with transformer-lens 3.9.0 and once
with 4.3.0 beside unmix: each writes what it can build (4.x has no `HookedTransformer`).
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file

from lm.families import some_tokens
from lm.lens_models import bridge, hf_model, hooked

HERE = Path(__file__).parent / "transformer_lens"
VERSION = version("transformer-lens")
BRIDGED = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "opt", "phi")
OPENAI = {"center_writing_weights": False}
# What no coder is trained on, or has no place of its own in a Hugging Face model.
LEFT_OUT = (
    "scale",
    "cos",
    "sin",
    "rot_",
    "scores",
    "pattern",
    "hidden_states",
    ".q.",
    ".k.",
    ".v.",
    "hook_q",
    "hook_k",
    "hook_v",
)


def record(kind: str, family: str, model: object) -> None:
    """Activations of layer 1 and around the blocks, in `FAMILY_KIND.safetensors`."""
    tokens = some_tokens(1, 6)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)  # type: ignore[attr-defined]
    kept = {"tokens": tokens, "logits": logits.contiguous()}
    for name, value in cache.items():
        around = not name.startswith("blocks.") or name.startswith("blocks.1.")
        if around and value.ndim >= 3 and not any(part in name for part in LEFT_OUT):
            kept[name] = value.clone().contiguous()
    HERE.mkdir(exist_ok=True)
    said = {"package": "transformer-lens", "version": VERSION, "kind": kind, "torch": torch.__version__.split("+")[0]}
    save_file(kept, HERE / f"{family}_{kind}.safetensors", metadata={"recorded": json.dumps(said)})
    weights = {name: value.clone() for name, value in hf_model(family).state_dict().items()}
    save_file(weights, HERE / f"{family}.safetensors")


def main() -> None:
    """Every kind that this version builds."""
    with tempfile.TemporaryDirectory() as folder:
        if VERSION.startswith("3."):
            for family in ("gpt2", "gpt_neox", "qwen2"):
                record("hooked", family, hooked(family, Path(folder) / family))
            for family in ("gpt2", "qwen2", "opt"):
                record("hooked_processed", family, hooked(family, Path(folder) / family, processed=True))
            record("hooked_openai", "gpt2", hooked("gpt2", Path(folder) / "gpt2", processed=True, **OPENAI))
            return
        for family in BRIDGED:
            record("bridge", family, bridge(family, Path(folder) / family))
        for family in ("gpt2", "gemma2"):
            record("bridge_compatible", family, bridge(family, Path(folder) / family, compatibility=True))


if __name__ == "__main__":
    main()
