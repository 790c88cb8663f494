"""`unmix index --model … --coder …`: a model, coders and text become an index."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmix.cli._index_text import check_source, check_text_words, make_tokens, require
from unmix.cli._sizes import parse_bytes
from unmix.cli._words import Words, read_words
from unmix.core.errors import ConfigError, CorruptError, ResumeError, missing_extra
from unmix.core.manifest import MANIFEST

if TYPE_CHECKING:
    from unmix.index.reader import LatentIndex
    from unmix.index.sources.opening import Opening

USAGE = """usage: unmix index --model MODEL --coder CODER --data SOURCE --out FOLDER [options]
       unmix index CONFIG [--section.field VALUE …]     a run file up to its index; unmix index CONFIG --help
       unmix index SUBCOMMAND …                         --help after any of them says more

Subcommands:
{subcommands}

Runs text through a model up to the last hook that a coder reads, encodes it with every coder, and writes where each
latent fires: the evidence that explaining and looking at latents begin with.
A stopped build goes on where it was: say the same command again.

What is indexed:
  --model MODEL        Hugging Face name or folder, GGUF file, builtin:smollm2
  --coder CODER        anything unmix inspect opens: folder, file, hf://…, release:… (all coders of a place);
                       NAME=CODER gives it a name; say --coder again for more coders on the same pass
  --data SOURCE        text or token ids: file, folder, hf:NAME, builtin:python-docs; or a folder of token shards
  --tokens N           how much of it (default 1M; of token shards: all)
  --out FOLDER         the index; tokens are kept beside it (RUN/index: RUN/tokens; else NAME-tokens)

The text:
  --context N          tokens in a context (default: what the coder was trained on, where its files say, else 128)
  --column NAME        column with the text (default text), or with the messages (default messages)
  --label-column NAME  its values become the slicing `label`, where they are at most 255 (unmix diff compares them)
  --split NAME         split of a hub data set (default train)
  --tokenised KIND     the source holds token ids: rows or documents
  --roles SHARES       which share of the documents is for what (default explain=0.5,score=0.5)
  --seed N             decides which document has which role
  --policy-of NAME     where coders disagree on BOS or masked positions: feed text as this one was trained

Chats:
  --chat               rows are conversations (role/content, from/value; .jsonl, .parquet, hf:NAME), rendered by the
                       model's chat template; who speaks becomes the slicing `speaker`
  --speakers NAMES     only these count: {speakers} (commas)
  --chat-template FILE another template (Jinja) than the tokenizer's own
  --tools-column NAME  tools that the template is told about
  --rollouts N         index what the model itself says: N continuations of each prompt of --prompts, in place of --data
  --prompts FILE       .txt (one prompt a line) or .jsonl (prompt, or messages)
  --new-tokens N       length of a roll-out at most (default 128)
  --temperature T --top-k K --top-p P     how they are drawn (default temperature 1)

The machine:
  --batch N            contexts in a forward pass (default 16)
  --budget SIZE        memory for postings (default 2GiB)
  --workers N          processes, each with the model (default 1); the result is the same
  --engine NAME        processes (default), or ray
  --shard I/N          only part I of N (0/N … N-1/N), for any scheduler; unmix index merge joins parts
  --restart            begin anew: tokens and index
  --dtype DTYPE --device DEVICE --revision REV --trust-remote-code
  --format FORMAT      how to read the coder, where several formats fit
  --hook HOOK          where the coder reads, where its files do not say
  --served vllm        activations come from vLLM through interp-engine (pip install 'unmix[vllm]')
"""
FLAGS = ("chat", "restart", "trust-remote-code")
OPTIONS = (
    "model", "data", "tokens", "out", "context", "column", "label-column", "split", "tokenised", "roles", "seed",
    "policy-of", "speakers", "chat-template", "tools-column", "rollouts", "prompts", "new-tokens", "temperature",
    "top-k", "top-p", "batch", "budget", "workers", "engine", "shard", "dtype", "device", "revision", "format", "hook",
    "served",
)  # fmt: skip
ENGINES = ("processes", "ray")


def usage() -> str:
    """The text of `unmix index --help`."""
    from unmix.cli.index import SUBCOMMANDS
    from unmix.data.config import SPEAKERS

    known = "\n".join(f"  {name:<8} {text}" for name, text in SUBCOMMANDS.items())
    return USAGE.format(subcommands=known, speakers=", ".join(SPEAKERS))


def command(arguments: list[str]) -> int:
    """Check everything, make the tokens, build, and say what came out."""
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(usage())
        return 0
    flags = {word[2:] for word in arguments if word[2:] in FLAGS and word.startswith("--")}
    asked = read_words([word for word in arguments if word[2:] not in flags], OPTIONS, "index", (), ("coder",))
    how = _how(asked)
    out = Path(require(asked, "out")).expanduser()
    _check_words(asked, flags)
    from unmix.index.building import build

    opening = _opening(asked, flags, out)
    if "restart" not in flags:
        _refuse_replacing(out, opening)
    built = build(
        out, opening, budget_bytes=how["budget"], workers=how["workers"], engine=how["engine"], part=how["part"],
        restart="restart" in flags,
    )  # fmt: skip
    sys.stdout.write(_summary(built, out) if built is not None else _part_done(how["part"], out))
    return 0


def _how(asked: Words) -> dict[str, Any]:
    engine, workers = asked.options.get("engine", ENGINES[0]), asked.whole("workers", 1)
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: allowed: {', '.join(ENGINES)}")
    if workers < 1:
        raise ConfigError(f"--workers {workers}: expected at least 1")
    batch = asked.whole("batch", 16)
    if batch < 1:
        raise ConfigError(f"--batch {batch}: expected at least 1")
    budget = parse_bytes("budget", asked.options.get("budget", "2GiB"))
    return {"engine": engine, "workers": workers, "budget": budget, "part": _part(asked.options.get("shard"))}


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not slash or not number.isdigit() or not count.isdigit() or not int(number) < int(count):
        raise ConfigError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(number), int(count)


def _check_words(asked: Words, flags: set[str]) -> None:
    """What the words alone can tell."""
    require(asked, "model")
    if not asked.again:
        raise ConfigError("--coder is missing; unmix index --help says what an index is made of")
    check_text_words(asked, flags)
    engine = asked.options.get("served")
    if engine not in (None, "vllm"):
        raise ConfigError(f"--served {engine}: allowed: vllm")
    if engine is not None and asked.whole("workers", 1) > 1:
        raise ConfigError(f"--served {engine}: one engine serves all, so --workers stays 1")
    if engine is not None and find_spec(engine) is None:
        raise missing_extra(engine, engine, f"--served {engine}")


def _opening(asked: Words, flags: set[str], out: Path) -> Opening:
    """The source, ready here and described for other processes; everything is checked on the way."""
    from unmix.index.sources.fitting import fit_coders, fit_packing, shared_policy
    from unmix.index.sources.live import LiveSource
    from unmix.index.sources.opening import (
        Known,
        ModelAt,
        Opening,
        absolute,
        kept_recipe,
        open_coders,
        recipe_of,
        served,
    )
    from unmix.index.sources.tokens import require_place

    require_place(out)
    check_source(asked, flags)
    named = open_coders([text for _, text in asked.again], asked.options.get("format"), asked.options.get("hook"))
    at = ModelAt(
        asked.options["model"], asked.options.get("dtype"), asked.options.get("device"), asked.options.get("revision"),
        "trust-remote-code" in flags,
    )  # fmt: skip
    lm = at.load()
    fit_coders(lm, named.coders)
    policy = shared_policy(named.coders, lm.tokenizer, asked.options.get("policy-of"))
    fit_packing(lm, policy)
    shards = make_tokens(asked, flags, out, lm, next(iter(named.coders.values())), policy)
    speakers = asked.options.get("speakers")
    counted = None if speakers is None else tuple(name.strip() for name in speakers.split(","))
    batch = asked.whole("batch", 16)
    model = replace(at, name=absolute(at.name), dtype=str(lm.dtype).removeprefix("torch."))
    kind = "served" if "served" in asked.options else "live"
    recipe = recipe_of(kind, model, named.places, shards.folder, batch, counted)
    meta = {"rebuild": kept_recipe(recipe, out)}
    source = LiveSource(lm, shards, named.coders, batch=batch, speakers=counted, meta=meta)
    if kind == "served":
        return Opening(recipe, served(source, model.name))
    # Workers open their own: one more model in this process would only take memory.
    alone = asked.whole("workers", 1) == 1 and asked.options.get("engine", ENGINES[0]) == ENGINES[0]
    return Opening(recipe, source if alone else Known.of(source, recipe))


def _refuse_replacing(out: Path, opening: Opening) -> None:
    """`ResumeError` where a finished index of other inputs stands at `out`: it may hold hours of work."""
    from unmix.index.layout import IndexMeta
    from unmix.index.plan import PLAN, Plan, differences, plan_of
    from unmix.index.shards import building_folder

    if not (out / MANIFEST).is_file():
        return
    try:
        made = IndexMeta.read(out).meta.get("build")
    except CorruptError:
        return  # it cannot be read, and is built again
    plan = plan_of(opening())
    old: Any = made if isinstance(made, dict) else {"key": None, "inputs": None}
    building = building_folder(out)
    if old["key"] == plan.key or ((building / PLAN).is_file() and Plan.read(building).key == plan.key):
        return
    changed = "not made by this command"
    if isinstance(old["inputs"], dict):
        changed = f"of other inputs: {'; '.join(differences(old['inputs'], plan.decides))}"
    raise ResumeError(f"--out {out}: holds an index {changed}. Say --restart to replace it, or choose another --out")


def _summary(index: LatentIndex, out: Path) -> str:
    from unmix.cli.plan import sized

    stats = index.stats
    width = max(len("coder"), *(len(name) for name in stats["coders"]))
    lines = [
        f"{stats['n_tokens']:,} tokens ({stats['n_counted']:,} count) in {stats['n_contexts']:,} contexts, "
        f"{sized(stats['bytes'])} at {out}",
        "",
        f"{'coder':<{width}}  {'latents':>9}  {'alive':>9}  {'L0':>7}  {'postings':>13}",
    ]
    for name, one in stats["coders"].items():
        lines.append(
            f"{name:<{width}}  {one['n_latents']:>9,}  {one['alive']:>9,}  {one['l0']:>7.2f}  {one['firings']:>13,}"
        )
    cut = ", ".join(f"{name} ({len(values)} values)" for name, values in index.description.slices.items())
    lines += ["", *([f"cut by {cut}"] if cut else []), f"look at it: unmix index stats {out}"]
    return "\n".join(lines) + "\n"


def _part_done(part: tuple[int, int] | None, out: Path) -> str:
    number, count = part or (0, 1)
    return (
        f"part {number}/{count} is done, others are missing; the last one at {out} finishes the index\n"
        f"parts on machines that share no folder are joined: unmix index merge OUT {out} PART …\n"
    )
