"""OpenSAE's `from_pretrained` on what we wrote: `python check_opensae_reads_ours.py OUT CHECKOUT`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from recording import dense, report, stub, written

stub("opensae", Path(sys.argv[2]) / "src" / "opensae")
torch.cuda.device = lambda *_: contextlib.nullcontext()

from opensae.saes.open_sae.modeling_open_sae import OpenSae  # noqa: E402

for kind, folder, expected in written(Path(sys.argv[1]), "opensae"):
    coder = OpenSae.from_pretrained(folder)
    out = coder.encode(expected["x"])
    acts = dense(out.sparse_feature_activations, out.sparse_feature_indices, coder.config.feature_size)
    y = coder.decode(out.sparse_feature_indices, out.sparse_feature_activations, out.input_mean, out.input_std)
    report("opensae", kind, acts, y.sae_output, expected)
