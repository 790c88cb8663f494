"""dictionary_learning's `from_pretrained` on what we wrote: `python check_dictionary_learning_reads_ours.py OUT`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from recording import report, stub, written

SITE = Path(importlib.util.find_spec("dictionary_learning").origin).parent
stub("dictionary_learning", SITE)
stub("dictionary_learning.trainers", SITE / "trainers")
stub("dictionary_learning.config", DEBUG=False)

from dictionary_learning import dictionary  # noqa: E402
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k  # noqa: E402

for kind, folder, expected in written(Path(sys.argv[1]), "dictionary_learning"):
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    modules = (dictionary, top_k, batch_top_k, matryoshka_batch_top_k)
    cls = next(getattr(module, name) for module in modules if hasattr(module, name))
    coder = cls.from_pretrained(folder / "ae.pt")
    acts = coder.encode(expected["x"])
    report("dictionary_learning", f"{kind} ({name})", acts, coder.decode(acts), expected)
