"""The fork's `from_pretrained` on what we wrote: `python check_crosscoders_read_ours.py OUT CHECKOUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from recording import report, stub, written

stub("dictionary_learning", Path(sys.argv[2]) / "dictionary_learning")
stub("datasets", load_dataset=None)
stub("zstandard")

from dictionary_learning.dictionary import BatchTopKCrossCoder, CrossCoder  # noqa: E402

for kind, folder, expected in written(Path(sys.argv[1]), "dictionary_learning_crosscoder"):
    config = json.loads((folder / "config.json").read_text())
    cls = BatchTopKCrossCoder if "k" in config else CrossCoder
    coder = cls.from_pretrained(str(folder), from_hub=True)
    acts = coder.encode(expected["x"].unflatten(1, (config["num_layers"], -1)))
    report("crosscoder", f"{kind} ({coder.code_normalization})", acts, coder.decode(acts), expected)
