"""`unmix index import`: delphi's cache as an index."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from unmix.cli._sizes import parse_bytes
from unmix.cli._words import read_words
from unmix.core.errors import ConfigError

USAGE = """usage: unmix index import CACHE OUT [options]

Reads a cache of delphi (latents/HOOK/FIRST_LAST.safetensors), or of sae_auto_interp before it, as an index; each hook
becomes a coder. Rows are taken as documents and dealt out to explainers and scorers by hash of their tokens, unless the
cache was written by `unmix index export`, which keeps what the index knew beside it.

  --tokens FILE.npy        token ids [rows, context], for old caches that do not hold them
  --document-token ID      the token that begins each document inside the rows (delphi joins by the end-of-text token)
  --tokenizer NAME         a tokenizer (name or folder), so that tokens show as text
  --budget SIZE            memory to work in (default 2GiB)
"""


def command(arguments: list[str]) -> int:
    """Write an index of a cache."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        return 0
    options = ("tokens", "document-token", "tokenizer", "budget")
    asked = read_words(arguments, options, "index import", ("CACHE", "OUT"))
    from unmix.cli._index_place import refuse_index
    from unmix.index.exchange import read_delphi
    from unmix.index.writer import DEFAULT_BUDGET

    cache, out = asked.words
    refuse_index(out)
    budget = parse_bytes("budget", asked.options.get("budget", str(DEFAULT_BUDGET)))
    index = read_delphi(
        cache, out, tokens=_tokens(asked.get("tokens")), document_token=asked.whole("document-token"),
        vocab=_vocab(asked.get("tokenizer")), budget_bytes=budget,
    )  # fmt: skip
    for name, coder in index.coders.items():
        firings = int(coder.figures.firings.sum())
        sys.stdout.write(
            f"{name}: {firings:,} postings of {coder.n_latents:,} latents over {index.n_tokens:,} tokens\n"
        )
    sys.stdout.write(f"{out}\n")
    return 0


def _tokens(path: str | None) -> Any:
    if path is None:
        return None
    import numpy as np

    if not Path(path).is_file():
        raise ConfigError(f"--tokens {path}: no such file")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"--tokens {path}: not an .npy file of numbers ({error})") from error


def _vocab(name: str | None) -> list[str] | None:
    if name is None:
        return None
    from unmix.lm.tokens import TokenStrings
    from unmix.train.language.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name)
    return TokenStrings(tokenizer)(range(len(tokenizer)))
