"""Fixtures of e2e_sae 2.1.1, by its own coder class. Run with the peer's interpreter; nothing else is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import yaml
from recording import D, F, fill, inputs, record, start, stub
from torch import nn

SITE = Path(importlib.util.find_spec("e2e_sae").origin).parent
stub("e2e_sae", SITE)
stub("e2e_sae.models", SITE / "models")

from e2e_sae.models.sparsifiers import SAE  # noqa: E402

POSITIONS = ["blocks.2.hook_resid_pre", "blocks.6.hook_resid_pre"]
CONFIG = {
    "tlens_model_name": "gpt2", "tlens_model_path": None, "seed": 0, "n_samples": 400_000,
    "saes": {"dict_size_to_input_ratio": F / D, "sae_positions": POSITIONS, "retrain_saes": False},
    "loss": {"sparsity": {"p_norm": 1.0, "coeff": 1.5}, "out_to_orig": None},
}  # fmt: skip


def coder(seed: int) -> SAE:
    made = SAE(D, F).eval()
    fill(made, seed)
    return made


saes = nn.ModuleDict({name.replace(".", "-"): coder(seed) for seed, name in enumerate(POSITIONS)})
folder = start("e2e_sae", "run")
(folder / "final_config.yaml").write_text(yaml.safe_dump(CONFIG))
torch.save(saes.state_dict(), folder / "samples_400000.pt")
x = inputs()
tensors, loads = {}, []
with torch.no_grad():
    for n, (key, sae) in enumerate(saes.items()):
        recon, acts = sae(x)
        tensors |= {f"{n}.x": x, f"{n}.acts": acts, f"{n}.recon": recon}
        loads.append({"place": ".", "name": key.replace("-", "."), "prefix": f"{n}."})
record(folder, tensors, "e2e_sae", "2.1.1", loads)

# The flat published form holds the decoder already at unit norm, and names no position inside the file.
folder = start("e2e_sae", "flat")
sae = coder(4)
with torch.no_grad():
    sae.decoder.weight.copy_(sae.dict_elements)
    recon, acts = sae(x)
names = {"encoder.0.weight": "encoder.weight", "encoder.0.bias": "encoder.bias"}
torch.save({names.get(key, key): value for key, value in sae.state_dict().items()}, folder / "samples_400000.pt")
flat = {**CONFIG, "saes": {**CONFIG["saes"], "sae_positions": POSITIONS[1]}}
(folder / "final_config.yaml").write_text(yaml.safe_dump(flat))
record(folder, {"x": x, "acts": acts, "recon": recon}, "e2e_sae", "2.1.1")
