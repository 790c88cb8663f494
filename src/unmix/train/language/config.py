"""What a small language model is trained from: text, tokenizer, shape, optimiser. Validated whole before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from unmix.core.config import Config, Count, apply_overrides, build, operational, read_yaml
from unmix.core.errors import ConfigError
from unmix.data.config import DataConfig, Role

CONFIG_FILE = "lm-train.yaml"
ALPHABET = 256
"""Bytes: every byte-level vocabulary holds them all, and the end-of-text token."""


def _roles() -> dict[Role, float]:
    return {"train": 0.95, "evaluate": 0.05}


class TextConfig(DataConfig):
    """The text: as in a run file, but nearly all of it to train on."""

    roles: dict[Role, float] = Field(default_factory=_roles)
    """The share of `tokens` that each role takes: `train` is learnt from, `evaluate` measures the loss."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        for role in ("train", "evaluate"):
            if self.roles.get(role, 0.0) <= 0:
                raise ValueError(f"roles needs a share for {role!r}, found {self.roles}")
        return self


class TokenizerConfig(Config):
    """A tokenizer trained on the text, or one that exists."""

    name: str | None = None
    """Hugging Face name or folder of a tokenizer; default: byte-level BPE trained on the documents of role train."""
    vocab_size: Count = Field(default=4096, gt=ALPHABET)
    """Tokens of a trained one, the 256 bytes and the end-of-text token among them."""
    characters: Count = Field(default=20_000_000, gt=0)
    """Characters of text that a trained one is made from, at most."""


class ShapeConfig(Config):
    """The network."""

    family: Literal["gpt2", "llama"] = "gpt2"
    """gpt2: learnt positions, LayerNorm, GELU. llama: rotary positions, RMSNorm, SwiGLU."""
    layers: PositiveInt = 4
    width: PositiveInt = 256
    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    """Heads of keys and values (llama); default: as many as `heads`."""
    mlp: PositiveInt | None = None
    """Width inside the MLP; default: 4 × width for gpt2, 8/3 × width (up to a multiple of 32) for llama."""
    context: PositiveInt | None = None
    """Longest context that the model takes; default: `data.context`."""
    tied: bool = True
    """Whether embedding and unembedding are one matrix."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} cannot be cut into {self.heads} heads")
        if self.family == "llama" and (self.width // self.heads) % 2:
            raise ValueError(f"llama's heads need an even width, found {self.width} / {self.heads}")
        if self.kv_heads is not None and self.family != "llama":
            raise ValueError(f"kv_heads belongs to llama; family is {self.family!r}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} cannot share kv_heads = {self.kv_heads}")
        return self

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        if self.mlp is not None:
            return self.mlp
        return 4 * self.width if self.family == "gpt2" else 32 * -(-self.width * 8 // 3 // 32)


class LanguageOptim(Config):
    """AdamW with a linear warm-up and a cosine decay."""

    steps: PositiveInt | None = None
    """Optimiser steps; or give `tokens` or `epochs`."""
    tokens: Count | None = Field(default=None, gt=0)
    """Tokens seen in all."""
    epochs: PositiveFloat | None = None
    """Passes over the training text; one where nothing is said."""
    batch: Count = Field(default=4096, gt=0)
    """Tokens a step, rounded down to whole contexts."""
    accumulate: PositiveInt = 1
    """Parts that a step's contexts are run in, one after the other, to save memory."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak that the cosine ends at."""
    warmup: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.1
    """On matrices; not on norms and biases."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of all gradients together; 0 for none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What products are computed in; weights and optimiser are float32 either way."""
    log_every: PositiveInt = operational(25)
    checkpoint_every: PositiveInt = operational(250)

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say how long to train; give one of them")
        return self


class HeldOutConfig(Config):
    """The loss on held-out documents."""

    tokens: Count = Field(default=32_768, gt=0)
    """Tokens of role evaluate, at most."""
    every: PositiveInt = operational(250)
    """Steps between two measurements; one more is made at the end."""


class SampleConfig(Config):
    """Text that the finished model writes."""

    prompts: tuple[str, ...] = ("",)
    """An empty one begins with the begin-of-sequence token alone."""
    tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.8
    top_k: PositiveInt | None = 50


class LanguageConfig(Config):
    """A whole `lm-train` file."""

    data: TextConfig = TextConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ShapeConfig = ShapeConfig()
    train: LanguageOptim = LanguageOptim()
    evaluate: HeldOutConfig = HeldOutConfig()
    sample: SampleConfig = SampleConfig()
    seed: int = 0
    device: str | None = operational(None)
    """Default: the CUDA card, else the CPU."""
    out: Path | None = operational(None)
    """The folder of everything; default: `runs/` and the name of the config file."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.data.context > self.context:
            raise ValueError(f"data.context = {self.data.context} is longer than model.context = {self.context}")
        if self.data.tokenised is not None and self.tokenizer.name is None:
            raise ValueError("tokenizer.name is needed where data.tokenised says that there are ids and no text")
        if self.train.batch < self.data.context:
            raise ValueError(f"train.batch = {self.train.batch} tokens hold no context of {self.data.context}")
        if self.contexts % self.train.accumulate:
            raise ValueError(
                f"a step's {self.contexts} contexts cannot be cut into accumulate = {self.train.accumulate} parts"
            )
        return self

    @property
    def context(self) -> int:
        """Longest context of the model."""
        return self.model.context if self.model.context is not None else self.data.context

    @property
    def contexts(self) -> int:
        """Contexts a step."""
        return self.train.batch // self.data.context


def load_language_config(place: str, overrides: dict[str, str] | None = None) -> LanguageConfig:
    """The validated config of a YAML file, or of a folder that `lm-train` made, with overrides applied."""
    path = Path(place)
    source = path / CONFIG_FILE if path.is_dir() else path
    if path.is_dir() and not source.is_file():
        raise ConfigError(f"{path}: is a folder without {CONFIG_FILE}, so lm-train did not make it")
    tree = apply_overrides(read_yaml(source), overrides or {})
    if not tree.get("out"):
        tree["out"] = str(path if path.is_dir() else Path("runs") / path.stem)
    return build(LanguageConfig, tree, source=str(source))
