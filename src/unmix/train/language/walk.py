"""From a config to a Hugging Face folder: tokenizer, shards, training, text; each kept, so that a kill costs little."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from unmix.core.atomic import atomic_folder, sweep, write_json, write_text
from unmix.core.config import semantic_dict, semantic_hash
from unmix.core.errors import ConfigError
from unmix.core.lock import folder_lock
from unmix.core.manifest import MANIFEST, require_whole, write_manifest
from unmix.data.corpora import find_source
from unmix.data.shards import TokenShards
from unmix.data.tokenise import tokenise
from unmix.lm.load import load_model, quiet_bars
from unmix.lm.precision import choose_device
from unmix.train.changes import claim
from unmix.train.language.config import CONFIG_FILE, LanguageConfig
from unmix.train.language.network import fresh_model
from unmix.train.language.sample import write_samples
from unmix.train.language.tokenizer import make_tokenizer
from unmix.train.language.trainer import LanguageTrainer

log = logging.getLogger("unmix")

KIND = "language-model"
NOTE = "settings.json"
RESULT = "result.json"
SAMPLE = "sample.txt"


@dataclass(frozen=True)
class LanguageResult:
    """What a finished training left."""

    folder: Path
    """Everything: shards, metrics, samples."""
    model: Path
    """The Hugging Face folder: weights, config, tokenizer."""
    figures: dict[str, Any]
    """parameters, vocabulary, steps, tokens, loss and held_out_loss (nats a token), perplexity."""
    samples: list[str]
    """What the model wrote, prompts included."""


def train_language(config: LanguageConfig) -> LanguageResult:
    """Train a small language model; goes on where it was stopped, and gives back what is done.

    Raises `ConfigError`, `DataError`, `NonFiniteError`, and `ResumeError` where `config.out` was made from other
    settings (it names them) or another process works there.
    """
    if config.out is None:
        raise ConfigError("out: lm-train needs a folder")
    folder = config.out.expanduser()
    find_source(config.data)  # a wrong path is said before anything is made
    device = choose_device(config.device)
    with folder_lock(folder):
        claim(folder, NOTE, semantic_dict(config))
        tree = config.model_dump(mode="json", exclude={"out"})
        write_text(folder / CONFIG_FILE, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        model = folder / "model"
        if not (model / MANIFEST).is_file():
            _train(config, folder, model, device)
        require_whole(model, KIND, deep=True)
        if not (folder / SAMPLE).is_file():
            _sample(config, folder, model, device)
        figures = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        samples = json.loads((folder / SAMPLE).with_suffix(".json").read_text(encoding="utf-8"))
    return LanguageResult(folder, model, figures, samples)


def _train(config: LanguageConfig, folder: Path, target: Path, device: torch.device) -> None:
    tokenizer = make_tokenizer(config.tokenizer, config.data, _swept(folder / "tokenizer"))
    shards = _shards(config, tokenizer, _swept(folder / "tokens"))
    model = fresh_model(config, tokenizer).to(device)
    log.info(
        "lm-train: %s parameters, vocabulary %d, %d contexts of %d tokens",
        f"{sum(p.numel() for p in model.parameters()):,}", len(tokenizer), shards.n_contexts, shards.context,
    )  # fmt: skip
    trainer = LanguageTrainer(model, shards, config, folder, semantic_hash(config, shards.hash))
    losses = trainer.run()
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "steps": trainer.steps,
        "tokens": trainer.steps * trainer.tokens_a_step,
        **losses,
        "perplexity": math.exp(losses["held_out_loss"]),
    }
    write_json(folder / RESULT, figures)
    with atomic_folder(_swept(target)) as temp, quiet_bars():
        model.cpu().save_pretrained(temp)
        tokenizer.save_pretrained(temp)
        write_manifest(temp, KIND, key=trainer.key, **figures)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _shards(config: LanguageConfig, tokenizer: Any, folder: Path) -> TokenShards:
    if (folder / MANIFEST).is_file():
        shards = TokenShards.open(folder)
        shards.verify()
        return shards
    return tokenise(config.data, tokenizer, folder)


def _sample(config: LanguageConfig, folder: Path, model: Path, device: torch.device) -> None:
    """Let the saved model write, as anyone who loads it would."""
    lm = load_model(model, dtype="float32", device=device)
    samples = write_samples(lm, config.sample, config.data.policy, config.seed)
    write_json(folder / "sample.json", samples)
    write_text(folder / SAMPLE, "\n---\n".join(samples) + "\n")


def _swept(path: Path) -> Path:
    sweep(path)
    return path
