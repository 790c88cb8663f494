"""e2e_sae's coder class on what we wrote: `python check_e2e_sae_reads_ours.py OUT` (see write_for_peers.py).

Its codes carry the decoder norms, which its layout folds; outputs are ours.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import yaml
from recording import report, stub, written
from torch import nn

SITE = Path(importlib.util.find_spec("e2e_sae").origin).parent
stub("e2e_sae", SITE)
stub("e2e_sae.models", SITE / "models")

from e2e_sae.models.sparsifiers import SAE  # noqa: E402

for kind, folder, expected in written(Path(sys.argv[1]), "e2e_sae"):
    config = yaml.safe_load((folder / "final_config.yaml").read_text())
    width = expected["x"].shape[-1]
    size = int(config["saes"]["dict_size_to_input_ratio"] * width)
    names = [name.replace(".", "-") for name in config["saes"]["sae_positions"]]
    saes = nn.ModuleDict({name: SAE(width, size) for name in names})
    (file,) = folder.glob("*.pt")
    saes.load_state_dict(torch.load(file, map_location="cpu"))
    recon, _ = saes[names[0]](expected["x"])
    report("e2e_sae", kind, None, recon, expected)
