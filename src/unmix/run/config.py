"""The run file: one section a stage, validated whole before anything is loaded."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from unmix.core.config import Config, Count, apply_overrides, build, operational, read_yaml
from unmix.core.errors import ConfigError, did_you_mean
from unmix.data.config import DataConfig
from unmix.explain.explainers import EXPLAINERS
from unmix.explain.scorers import SCORERS
from unmix.train.config import CoderSpec, OptimConfig

BUILTIN = "builtin:"
RUN_FILE = "run.yaml"
SHORTHANDS = {"model": "model.name", "data": "data.source", "hook": "coder.hook"}
"""Flags that are short for a dotted field."""


class ModelSpec(Config):
    """Which language model, and how it is held."""

    name: str
    """Hugging Face name or folder, GGUF file, or `builtin:smollm2`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the machine computes in it, else float32."""
    revision: str | None = None
    device: str | None = operational(None)
    trust_remote_code: bool = False


class CaptureConfig(Config):
    """How activations reach training and index."""

    cache: Literal["disk", "none"] = operational("disk")
    """disk: the model runs once and activations are memory-mapped; none: it runs again for every epoch."""
    keep: bool = operational(False)
    """Leave the cache on disk when the run is finished."""
    batch: PositiveInt = 16
    """Contexts in a forward pass."""


class EvaluateConfig(Config):
    """What is measured on held-out documents."""

    tokens: Count = 24_000
    """Tokens of role `evaluate` that go through the spliced model."""
    ablations: tuple[Literal["zero", "mean"], ...] = ("zero", "mean")
    """What the reconstruction is compared with; each costs one more forward pass."""
    batch: PositiveInt = operational(8)


class IndexConfig(Config):
    """The latent index."""

    budget: Count = operational(2 * 2**30)
    """Bytes of postings held before a segment is written."""


class ClientConfig(Config):
    """An OpenAI-compatible endpoint for LLM explainers and judges. The key comes from the environment."""

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: PositiveInt = operational(4)
    timeout: float = operational(60.0)


class ExplainConfig(Config):
    """Which latents get which explanations and scores."""

    latents: PositiveInt = 200
    explainers: tuple[str, ...] = ("ngram", "tokens")
    scorers: tuple[str, ...] = ("pattern",)
    baseline: bool = True
    """Score explanations of other latents too: what chance would give."""
    client: ClientConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for registry, chosen in ((EXPLAINERS, self.explainers), (SCORERS, self.scorers)):
            if not chosen:
                raise ValueError(f"at least one {registry.noun} is needed")
            for name in chosen:
                if name not in registry.names():
                    raise ValueError(f"unknown {registry.noun} {name!r}. {did_you_mean(name, registry.names())}")
                if self.client is None and hasattr(registry.get(name), "ask"):
                    raise ValueError(f"{registry.noun} {name!r} asks a language model: set client.base_url and .model")
        return self


class ReportConfig(Config):
    """The static report."""

    windows: PositiveInt = 24
    """Windows shown for each latent."""
    context: tuple[int, int] = (20, 8)
    """Tokens shown before and after the strongest one."""


class TrainConfig(Config):
    """Model, text, coder and optimiser: what `unmix.train` needs."""

    model: ModelSpec
    data: DataConfig = DataConfig()
    coder: CoderSpec
    capture: CaptureConfig = CaptureConfig()
    train: OptimConfig = OptimConfig()
    seed: int = 0
    out: Path | None = operational(None)
    """The run folder; default: `runs/` and the name of the run file."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.train.sparsity > 0 and self.coder.activation in ("topk", "batchtopk"):
            raise ValueError(
                f"train.sparsity belongs to relu and jumprelu; coder.activation is {self.coder.activation!r}"
            )
        return self


class RunConfig(TrainConfig):
    """Every stage of a run."""

    evaluate: EvaluateConfig = EvaluateConfig()
    index: IndexConfig = IndexConfig()
    explain: ExplainConfig = ExplainConfig()
    report: ReportConfig = Field(default=ReportConfig())


def run_tree(place: str) -> tuple[dict[str, Any], str]:
    """`(fields, source)` of a run file: a YAML path, a run folder that holds one, or `builtin:NAME`."""
    if place.startswith(BUILTIN):
        names = builtin_runs()
        name = place[len(BUILTIN) :]
        if name not in names:
            raise ConfigError(f"no built-in run {name!r}. {did_you_mean(name, names)}")
        with resources.as_file(resources.files("unmix.run") / "builtin" / f"{name}.yaml") as path:
            return read_yaml(path), place
    path = Path(place)
    if path.is_dir():
        if not (path / RUN_FILE).is_file():
            raise ConfigError(f"{path}: is a folder without {RUN_FILE}, so not a run")
        return {**read_yaml(path / RUN_FILE), "out": str(path)}, str(path / RUN_FILE)
    return read_yaml(path), place


def builtin_runs() -> list[str]:
    """Names of the run files that come with the package."""
    folder = resources.files("unmix.run") / "builtin"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_run(place: str, overrides: dict[str, str] | None = None) -> RunConfig:
    """The validated config of a run file with overrides applied, its folder filled in."""
    tree, source = run_tree(place)
    dotted = {SHORTHANDS.get(key, key): value for key, value in (overrides or {}).items()}
    tree = apply_overrides(tree, dotted)
    if not tree.get("out"):
        tree["out"] = str(Path("runs") / Path(place.removeprefix(BUILTIN)).stem)
    return build(RunConfig, tree, source=source)
