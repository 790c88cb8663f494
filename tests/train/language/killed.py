"""Trains a tiny language model in forked children that are killed and resumed; `python -m train.language.killed …`.

A case is `MOMENT[:MOMENT …]`, as in `train.killed`: one child after another dies at its moment, the last one runs to
the end. `FOLDER/CASE` is then the whole folder of `lm-train`. The second argument is a folder of text.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from train.killed import after, half_a_line, in_children, quicken
from unmix.core import atomic
from unmix.train import metrics_log
from unmix.train.language import checkpoint, sample, tokenizer, walk
from unmix.train.language.trainer import LanguageTrainer

from .toys import language_config


def arm(moment: str) -> None:
    """Set the trap. Checkpoints fall on steps 4 and 8 of 10, log lines on 3, 6 and 9, held-out losses on 5 and 10."""
    name, _, number = moment.partition("@")
    if name == "step":
        after(LanguageTrainer, "step", int(number))
    elif name == "saving":
        after(checkpoint, "save_file", int(number))
    elif name == "manifest":
        after(checkpoint, "write_manifest", int(number), run=False)
    elif name == "exchange":
        after(atomic, "_exchange", int(number))
    elif name == "tokenizer":
        after(tokenizer, "write_manifest", 1, run=False)
    elif name == "tokens":
        after(walk, "tokenise", 1)
    elif name == "result":
        after(walk, "write_json", int(number))
    elif name == "model":
        after(walk, "write_manifest", 1, run=False)
    elif name == "sample":
        after(sample, "draw", int(number))
    elif name == "line":
        metrics_log.MetricsLog.write = half_a_line
    elif name != "never":
        raise ValueError(moment)


def train(folder: Path, text: Path, moment: str) -> None:
    """One child's life."""
    arm(moment)
    walk.train_language(language_config(text, folder))


def main(root: Path, text: Path, cases: list[str]) -> None:
    """Every case, each child in a process of its own."""
    quicken()
    train(root / "straight", text, "never")  # what torch and transformers import late, once for all children
    for case in cases:
        in_children(case, case.split(":"), partial(train, root / case, text))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
