"""`explain` and `score`: rows are asked for, taken one by one, and end as done or failed. Finished work is kept.

Language models are asked concurrently; everything else is computed in a plain loop. Rows are written by the calling
thread alone, so a kill leaves at most the rows that were in flight, which the next call takes up again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from unmix.core.config import Config, build, semantic_dict, semantic_hash
from unmix.core.errors import ConfigError
from unmix.core.progress import Task, task
from unmix.explain.choosing import choose_latents
from unmix.explain.clients.calls import Client
from unmix.explain.explainers import EXPLAINERS
from unmix.explain.explainers.base import AskingExplainer, BorrowingExplainer, DirectExplainer, Explainer
from unmix.explain.ledger import Ledger
from unmix.explain.results import Draft, Figures, Question
from unmix.explain.rows import Explanation, ExplanationKey, ScoreKey
from unmix.explain.scorers import SCORERS
from unmix.explain.scorers.base import DirectScorer, Scorer
from unmix.explain.windows import View, open_view
from unmix.explain.working import Job, work
from unmix.index.reader import LatentIndex, open_index


@dataclass(frozen=True)
class Coverage:
    """How far a call (and those before it) got with what was asked for."""

    method: str
    asked: int
    done: int
    failed: dict[str, int] = field(default_factory=lambda: {})
    """By class of failure."""
    open: int = 0
    """Pending, or in the hands of another process."""


def explain(
    index: LatentIndex | str | Path,
    latents: int | Sequence[int],
    *,
    explainer: str = "ngram",
    client: Client | None = None,
    ledger: Ledger | str | Path | None = None,
    config: Config | Mapping[str, Any] | None = None,
    coder: str | None = None,
    sample: int = 0,
    seed: int = 0,
    retry_failed: bool = False,
    progress: bool = True,
) -> Coverage:
    """Explain latents of one coder; what the ledger holds already is not done again.

    Args:
        latents: their ids, or how many `choose_latents` shall choose.
        explainer: a name of the registry `unmix.explainers`; `random:ngram` deals `ngram`'s explanations out wrongly.
        client: the language model, for explainers that ask one.
        ledger: an open ledger or its path; default: `ledger.sqlite` beside the index folder.
        config: the explainer's own config, or its fields.
        coder: which coder, where the index has several.
        sample: number of this explanation among several of the same kind (language models may be asked twice).
        retry_failed: try rows again that failed before.

    Raises:
        ConfigError: an unknown explainer, latent, coder or field; a client missing.
        DataError: the index has no context that explaining may see.
        ServiceError: the language model cannot be used at all; what was not done stays pending.
    """
    index = _opened(index)
    name, _, source = explainer.partition(":")
    made: Explainer = _made(EXPLAINERS.get(name), config, {"source": source} if source else {})
    asking = isinstance(made, AskingExplainer)
    _need_client(explainer, asking, client)
    view = open_view(index, "explaining", coder, seed)
    ids = choose_latents(index, latents, seed, view.coder.name) if isinstance(latents, int) else _checked(view, latents)
    with _ledger(ledger, index) as book:
        base = {"coder": view.coder.name, "coder_hash": coder_hash(index, view.coder.name), "index_hash": index.hash}
        described: dict[str, Any] = _described(name, made, client if asking else None) | {"view_seed": seed}
        lent: dict[int, Explanation] = {}
        if isinstance(made, BorrowingExplainer):
            source = str(described["config"]["source"])
            lent, described["of"] = _borrowed(book, base, made, source, sample)
            ids = [i for i in ids if i in lent]
            explainer = f"{name}:{source}"
        hashed = semantic_hash(described)
        keys = [ExplanationKey(**base, latent=i, method=explainer, config_hash=hashed, sample=sample) for i in ids]
        rows = book.ask_explanations(keys, described)
        jobs = [Job(row, _explaining(made, view, i, lent)) for row, i in zip(rows, ids)]
        with _bar(f"explain {explainer}", len(jobs), "latents", progress) as bar:
            work(book, "explanations", jobs, client if asking else None, bar, retry_failed)
        return _coverage(book, "explanations", explainer, rows)


def score(
    index: LatentIndex | str | Path,
    ledger: Ledger | str | Path | None = None,
    *,
    scorer: str = "pattern",
    explainer: str | None = None,
    client: Client | None = None,
    config: Config | Mapping[str, Any] | None = None,
    latents: Sequence[int] | None = None,
    coder: str | None = None,
    sample: int = 0,
    seed: int = 0,
    retry_failed: bool = False,
    progress: bool = True,
) -> Coverage:
    """Score the done explanations of this index that the scorer can score; on contexts that no explainer has seen.

    Args as `explain`; `explainer` and `latents` narrow what is scored (default: everything).

    Raises:
        ConfigError: as `explain`; also where there is nothing to score.
        DataError: the index has no context of the role `score`.
        ServiceError: as `explain`.
    """
    index = _opened(index)
    made: Scorer = _made(SCORERS.get(scorer), config, {})
    asking = not isinstance(made, DirectScorer)
    _need_client(scorer, asking, client)
    with _ledger(ledger, index) as book:
        found = _to_score(book, index, coder, explainer, latents, scorer, made)
        views = {name: open_view(index, "scoring", name, seed) for name in dict.fromkeys(e.coder for e in found)}
        described = _described(scorer, made, client if asking else None) | {"view_seed": seed}
        hashed = semantic_hash(described)
        rows = book.ask_scores([ScoreKey(e.id, index.hash, scorer, hashed, sample) for e in found], described)
        jobs = [Job(row, _scoring(made, views[e.coder], e)) for row, e in zip(rows, found)]
        with _bar(f"score {scorer}", len(jobs), "explanations", progress) as bar:
            work(book, "scores", jobs, client if asking else None, bar, retry_failed)
        return _coverage(book, "scores", scorer, rows)


def coder_hash(index: LatentIndex, coder: str) -> str:
    """The coder's hash as the index's builder noted it; `unknown:NAME` where it noted none."""
    hashes = index.meta.get("coder_hash")
    found = cast("dict[str, Any]", hashes).get(coder) if isinstance(hashes, dict) else hashes
    return str(found) if found else f"unknown:{coder}"


def _explaining(
    made: Explainer, view: View, latent: int, lent: Mapping[int, Explanation]
) -> Callable[[], Draft | Figures | Question]:
    if isinstance(made, BorrowingExplainer):
        other = lent[latent]
        return lambda: Draft(other.text or "", {**other.data, "of_latent": other.latent, "explanation": other.id})
    if isinstance(made, DirectExplainer):
        return lambda: made.explain(view[latent])
    return lambda: made.ask(view[latent])


def _scoring(made: Scorer, view: View, explanation: Explanation) -> Callable[[], Draft | Figures | Question]:
    draft = Draft(explanation.text or "", explanation.data)
    if isinstance(made, DirectScorer):
        return lambda: made.score(view[explanation.latent], draft)
    return lambda: made.ask(view[explanation.latent], draft)


def _borrowed(
    book: Ledger, base: Mapping[str, Any], made: BorrowingExplainer, source: str, sample: int
) -> tuple[dict[int, Explanation], list[str]]:
    """Whose explanation each latent is given, and the config hashes those were made with."""
    where = {name: base[name] for name in ("coder_hash", "index_hash")}
    own = {e.latent: e for e in book.explanations(method=source, status="done", sample=sample, **where)}
    pairs = made.pair(list(own))
    if not pairs:
        raise ConfigError(
            f"the random baseline deals out explanations of {source!r}, and the ledger holds {len(own)} of them for "
            f"this index; explain at least two latents with {source!r} first"
        )
    return {latent: own[other] for latent, other in pairs.items()}, sorted({e.config_hash for e in own.values()})


def _to_score(
    book: Ledger, index: LatentIndex, coder: str | None, explainer: str | None, latents: Sequence[int] | None,
    scorer: str, made: Scorer,
) -> list[Explanation]:  # fmt: skip
    names = [index.coder(coder).name] if coder is not None else index.names
    where: dict[str, Any] = {"index_hash": index.hash, "status": "done"}
    if explainer is not None:
        where["method"] = explainer
    done = [e for e in book.explanations(**where) if e.coder in names and (latents is None or e.latent in set(latents))]
    whose = f" by {explainer!r}" if explainer else ""
    if not done:
        raise ConfigError(f"{book.path}: no finished explanations{whose} of {index.folder} to score; explain first")
    taken = [e for e in done if made.takes(Draft(e.text or "", e.data))]
    if not taken:
        raise ConfigError(
            f"scorer {scorer!r} cannot score the explanations{whose}: it runs patterns, and they are text only; "
            "use detection or fuzzing"
        )
    return taken


def _opened(index: LatentIndex | str | Path) -> LatentIndex:
    return index if isinstance(index, LatentIndex) else open_index(index)


@contextmanager
def _ledger(ledger: Ledger | str | Path | None, index: LatentIndex) -> Generator[Ledger]:
    if isinstance(ledger, Ledger):
        yield ledger
        return
    with Ledger(ledger if ledger is not None else index.folder.parent / "ledger.sqlite") as book:
        yield book


def _made(cls: Any, config: Config | Mapping[str, Any] | None, more: Mapping[str, Any]) -> Any:
    if isinstance(config, Config):
        config = config.model_dump()
    return cls(build(cls.Config, {**(config or {}), **more}, source=f"config of {cls.__name__}"))


def _described(name: str, made: Explainer | Scorer, client: Client | None) -> dict[str, Any]:
    """Everything that decides the result; it is kept in the row, and hashed."""
    described: dict[str, Any] = {"name": name, "config": semantic_dict(made.config)}
    prompt = getattr(made, "prompt", None)
    if prompt is not None:
        described["prompt"] = prompt.digest
    if client is not None:
        described["client"] = client.describe()
    return described


def _need_client(name: str, asking: bool, client: Client | None) -> None:
    if asking and client is None:
        raise ConfigError(
            f"{name!r} asks a language model: give client=OpenAIClient(base_url, model) of any OpenAI-compatible server"
        )


def _checked(view: View, latents: Sequence[int]) -> list[int]:
    ids = list(dict.fromkeys(int(i) for i in latents))
    bad = [i for i in ids if not 0 <= i < view.coder.n_latents]
    if bad:
        raise ConfigError(f"no latent {bad[0]} in {view.coder.name!r}: it has latents 0 to {view.coder.n_latents - 1}")
    return ids


def _bar(name: str, total: int, unit: str, progress: bool) -> Any:
    return task(name, total, unit) if progress else nullcontext(Task(name, total, unit, every=float("inf")))


def _coverage(book: Ledger, table: Any, method: str, rows: Sequence[int]) -> Coverage:
    states = book.states(table, rows)
    failed = Counter(error or "?" for status, error in states.values() if status == "failed")
    done = sum(status == "done" for status, _ in states.values())
    return Coverage(method, len(rows), done, dict(sorted(failed.items())), len(rows) - done - sum(failed.values()))
