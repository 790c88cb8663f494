"""The run file: one section a stage, validated whole before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from unmix.core.config import Config, Count, apply_overrides, build, operational, read_yaml
from unmix.core.errors import ConfigError, FormatError, did_you_mean
from unmix.core.seeds import slug
from unmix.data.config import DataConfig
from unmix.explain.explainers import EXPLAINERS
from unmix.explain.scorers import SCORERS
from unmix.formats.publishing import require_place
from unmix.train.config import PICKING, CoderSpec, OptimConfig
from unmix.train.parallel.config import ParallelConfig
from unmix.train.plan import PlanConfig

BUILTIN = "builtin:"
RUN_FILE = "run.yaml"
SHORTHANDS = {
    "model": "model.name", "data": "data.source", "hook": "coder.hook", "on_nonfinite": "train.on_nonfinite",
    "push_to_hub": "publish.hub",
}  # fmt: skip
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
    ahead: bool = operational(True)
    """Make the next rows in a thread of their own while the coder learns from these."""


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


class PublishConfig(Config):
    """Where the finished coders go on the Hugging Face hub; the token is `HF_TOKEN`'s or that of `hf auth login`."""

    hub: str
    """`owner/name`; made where it is not there."""
    path: str = ""
    """Folder in it. One coder lies right there, several (not a set) in folders of their names below."""
    format: str = "native"
    """Any that `unmix.convert` writes."""
    private: bool = False
    revision: str | None = None
    """Branch; default: the main one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            require_place(self.hub, self.path)
        except FormatError as error:
            raise ValueError(str(error)) from None
        return self


class OneOfMany(CoderSpec):
    """One of several coders of a run."""

    train: dict[str, Any] = {}
    """Fields of the section `train` that are this coder's own."""


@dataclass(frozen=True)
class Member:
    """One coder of a run with what it is trained by."""

    name: str
    spec: CoderSpec
    train: OptimConfig


class TrainConfig(Config):
    """Model, text, coder and optimiser: what `unmix.train` needs."""

    model: ModelSpec
    data: DataConfig = DataConfig()
    coder: CoderSpec | None = None
    coders: dict[str, OneOfMany] = {}
    """Several coders by name, instead of `coder`: one stream of activations trains them side by side."""
    coder_set: str | None = None
    """Name of the set that `coders` are: trained on the error of the sums of what they write, and saved as one.

    A cross-layer transcoder is such a set.
    """
    capture: CaptureConfig = CaptureConfig()
    train: OptimConfig = OptimConfig()
    parallel: ParallelConfig = operational(ParallelConfig())
    """The mesh of a training started by `torchrun`."""
    plan: PlanConfig = operational(PlanConfig())
    """What `unmix plan` reckons with."""
    publish: PublishConfig | None = operational(None)
    """The finished coders go to the hub, with a card; not at all unless asked for."""
    seed: int = 0
    out: Path | None = operational(None)
    """The run folder; default: `runs/` and the name of the run file."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.coder is None) == (not self.coders):
            raise ValueError("coder: missing; a run has one coder, or several by name under coders, and not both")
        for name in self.coders:
            if slug(name) != name:
                raise ValueError(f"coders.{name}: a coder's name is a folder's; try {slug(name)!r}")
        if self.coder_set is not None:
            self._fits_a_set(self.coder_set)
        for member in self.members().values():
            where = f"coders.{member.name}" if self.coders else "coder"
            if member.train.sparsity > 0 and member.spec.activation in PICKING:
                raise ValueError(
                    f"train.sparsity belongs to relu, jumprelu and gated; "
                    f"{where}.activation is {member.spec.activation!r}"
                )
        return self

    def _fits_a_set(self, name: str) -> None:
        from unmix.train.objectives import OF_MODEL
        from unmix.train.trainer import SHARED

        if not self.coders or slug(name) != name:
            raise ValueError(
                f"coder_set: names the folder of the coders under `coders` that are trained as one; found {name!r}"
                + ("" if self.coders else " and no coders")
            )
        if name in self.coders:
            raise ValueError(f"coder_set: {name!r} is the name of one of its coders too")
        members = self.members()
        for field in SHARED:
            values = {name: getattr(member.train, field) for name, member in members.items()}
            if len(set(values.values())) > 1:
                raise ValueError(f"coder_set: coders of a set must share train.{field}, found {values}")
        for member in members.values():
            if member.spec.reads == member.spec.writes:
                raise ValueError(f"coders.{member.name}: reads what it writes; coders of a set write to other hooks")
            seen = [spec.term for spec in member.train.objective or () if spec.term in OF_MODEL]
            if seen:
                raise ValueError(
                    f"coders.{member.name}: the term {seen[0]} looks at the language model, and coders of a set are "
                    "trained on rows of activations"
                )

    def members(self) -> dict[str, Member]:
        """Every coder of the run by its name: its own, its key, or a slug of the hook as the run file writes it.

        `ConfigError` for a field of its own that the section `train` does not have.
        """
        if self.coder is not None:
            name = slug(self.coder.name or self.coder.reads[0])
            return {name: Member(name, self.coder, self.train)}
        shared = self.train.model_dump(mode="json", exclude_unset=True)
        found: dict[str, Member] = {}
        for name, spec in self.coders.items():
            own = build(OptimConfig, {**shared, **spec.train}, source=f"coders.{name}.train")
            found[name] = Member(name, spec, own)
        return found


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


def run_with(place: str, overrides: dict[str, str] | None = None) -> tuple[dict[str, Any], Path]:
    """The fields of a run file with overrides applied, not validated yet, and the run's folder."""
    tree, _ = run_tree(place)
    tree = apply_overrides(tree, {SHORTHANDS.get(key, key): value for key, value in (overrides or {}).items()})
    if not tree.get("out"):
        tree["out"] = str(Path("runs") / Path(place.removeprefix(BUILTIN)).stem)
    return tree, Path(str(tree["out"]))


def load_run(place: str, overrides: dict[str, str] | None = None) -> RunConfig:
    """The validated config of a run file with overrides applied, its folder filled in."""
    tree, _ = run_with(place, overrides)
    return build(RunConfig, tree, source=run_tree(place)[1])


def refuse_several(config: TrainConfig, until: str | None) -> None:
    """`ConfigError` where several coders are to be explained: names, scores and report are one coder's."""
    if config.coders and until in (None, "explain", "score", "report"):
        raise ConfigError(
            f"explain, score and report work on one coder, and this run has {len(config.coders)} "
            f"({', '.join(config.coders)}): say --until index, or use unmix train, evaluate or index"
        )
