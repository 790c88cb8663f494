"""sparsify on what we wrote: `python check_sparsify_reads_ours.py OUT OLD_CHECKOUT` (see write_for_peers.py).

Signed coders go to the code of July 2024, the rest to 1.3.3.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from recording import dense, report, stub, written

stub("transformers", PreTrainedModel=object)
stub("accelerate")
stub("accelerate.utils", send_to_device=None)
stub("sparsify", Path(importlib.util.find_spec("sparsify").origin).parent)
stub("sae", Path(sys.argv[2]) / "sae")

from sae.sae import Sae  # noqa: E402
from sparsify.sparse_coder import SparseCoder  # noqa: E402

for kind, folder, expected in written(Path(sys.argv[1]), "sparsify"):
    coder = (Sae if kind == "signed" else SparseCoder).load_from_disk(folder)
    out = coder.encode(expected["x"])
    acts = dense(out.top_acts, out.top_indices, coder.encoder.out_features)
    report("sparsify", kind, acts, coder(expected["x"]).sae_out, expected)
