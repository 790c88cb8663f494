"""`unmix lm-train`: a small language model of one's own, from text."""

from __future__ import annotations

import sys

from unmix.core.config import parse_overrides
from unmix.core.errors import ConfigError

USAGE = """usage: unmix lm-train CONFIG [--out FOLDER] [--section.field VALUE …]

Trains a small GPT from text and leaves a Hugging Face folder, FOLDER/model, that transformers and every unmix command
load: unmix run RUN.yaml --model FOLDER/model. CONFIG is a YAML file, or a folder that lm-train made.
A stopped training goes on where it was: say the same command again.

  --out FOLDER      everything goes there (default: runs/ and the name of the config)
  --section.field VALUE   any field of the config, e.g. --model.layers 6 --train.tokens 10M --data.source texts/

sections: data (text, as in a run file), tokenizer (name, or vocab_size of one trained on the text), model (family gpt2
or llama, layers, width, heads, context, tied), train (steps | tokens | epochs, batch, lr, warmup, dtype, …),
evaluate (tokens, every), sample (prompts, tokens, temperature), seed, device.
"""


def command(arguments: list[str]) -> int:
    """Train, and print the figures and the text that the model writes."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if arguments[0].startswith("-"):
        raise ConfigError(f"the first argument is a config file or a folder of lm-train, found {arguments[0]!r}")
    from unmix.train.language.config import load_language_config

    config = load_language_config(arguments[0], parse_overrides(arguments[1:]))
    from unmix.train.language.walk import train_language

    result = train_language(config)
    found = result.figures
    sys.stdout.write(
        f"parameters      {found['parameters']:,}\n"
        f"vocabulary      {found['vocabulary']:,} tokens\n"
        f"seen            {found['tokens']:,} tokens in {found['steps']:,} steps\n"
        f"training loss   {found['loss']:.3f} nats a token\n"
        f"held-out loss   {found['held_out_loss']:.3f} nats a token (perplexity {found['perplexity']:.1f})\n"
        f"model           {result.model}\n"
    )
    for text in result.samples:
        sys.stdout.write(f"\nit writes\n  {text.strip()!r}\n")
    return 0
