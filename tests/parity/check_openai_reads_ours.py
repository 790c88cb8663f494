"""OpenAI's own loader on what we wrote: `python check_openai_reads_ours.py OUT CHECKOUT` (see write_for_peers.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from recording import report, stub, written

sys.path.insert(0, sys.argv[2])
stub("blobfile")

from sparse_autoencoder.model import Autoencoder  # noqa: E402

for kind, folder, expected in written(Path(sys.argv[1]), "openai"):
    (file,) = folder.rglob("*.pt")
    coder = Autoencoder.from_state_dict(torch.load(file, weights_only=True))
    acts, info = coder.encode(expected["x"])
    report("openai", kind, acts, coder.decode(acts, info), expected)
