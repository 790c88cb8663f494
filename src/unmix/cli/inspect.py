"""`unmix inspect`: what a coder is, told even where loading it is refused; and whether it does what was published."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from unmix.core.config import parse_count, parse_overrides
from unmix.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from unmix.coder.sparse_coder import SparseCoder
    from unmix.evaluate.self_check import SelfCheck

USAGE = """usage: unmix inspect PLACE [--format FORMAT] [--name CODER] [--json]
                     [--model MODEL [--text SOURCE] [--tokens N] [--context N] [--hook HOOK] [--thorough]]

PLACE is a coder's folder or file, hf://owner/repo/path, release:NAME/ID, wandb://entity/project/name or
https://host/file. Says its format, origin, tensors, shapes, hooks, activation, norms and health. Opens what `load`
refuses, counts its NaN and infinities, and says why it is refused.

  --format FORMAT  how to read it, where several formats fit
  --name CODER     one coder, where the place holds several
  --json           everything, as JSON

With a language model it measures L0 and FVU there, and compares them with what was published. Where they do not agree
it tries other readings of the same files (the hooks nearby, scales, folded norms) and names those that fit. Where no
FVU was published, it looks at the hooks nearby in any case.

  --model MODEL    Hugging Face name or folder, GGUF file, builtin:smollm2; runs in float32
  --text SOURCE    file, folder, hf:NAME or builtin:python-docs (default)
  --tokens N       tokens to measure on (default 8192)
  --context N      tokens a context (default: what the coder was trained on, else 128)
  --hook HOOK      what the coder reads, in place of what its files say (several: commas)
  --write HOOK     what it writes, likewise (default: what it reads, if it did so before)
  --thorough       try the other readings even where the stated one agrees, and pairs of them

Exit code 0: told, and agrees where it was measured. 1: measured and does not agree, or refused by `load` and so not
measured. 2 and above: as every command.
"""
_FLAGS = ("json", "thorough")
_MEASURING = ("text", "tokens", "context", "hook", "write", "thorough")
_OPTIONS = ("format", "name", "model", *_MEASURING[:-1])


def command(arguments: list[str]) -> int:
    """Print facts about the coders of one place; measure one with `--model`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    place, options, flags = _parse(arguments)
    from unmix.cli._coder_facts import check_lines, lines
    from unmix.formats.inspection import inspect

    facts = inspect(place, options.get("format"))
    _choose(facts, options)
    if facts["loadable"]:
        _count_silent(facts, place, options)
    in_json = "json" in flags
    if not in_json:
        sys.stdout.write("\n".join(lines(facts)) + "\n")
        sys.stdout.flush()  # measuring takes a while
    code = 0
    if "model" in options:
        found = _measure(facts, place, options, "thorough" in flags)
        code = 0 if found is not None and found.agrees else 1
        facts["self_check"] = None if found is None else found.model_dump()
        if not in_json:
            sys.stdout.write("\n".join(check_lines(found, facts.get("measured_on", {}), "thorough" in flags)) + "\n")
    if in_json:
        sys.stdout.write(json.dumps(facts, indent=2, default=str) + "\n")
    return code


def _parse(arguments: list[str]) -> tuple[str, dict[str, str], set[str]]:
    flags = {word[2:] for word in arguments if word in tuple(f"--{flag}" for flag in _FLAGS)}
    words = [word for word in arguments if word not in tuple(f"--{flag}" for flag in _FLAGS)]
    if not words or words[0].startswith("-"):
        raise ConfigError("inspect needs a PLACE first: unmix inspect PLACE [--json] [--model MODEL]")
    options = parse_overrides(words[1:])
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(f"unknown option --{name}. {did_you_mean(name, (*_OPTIONS, *_FLAGS))}")
    needless = [name for name in _MEASURING if name in options or name in flags]
    if needless and "model" not in options:
        raise ConfigError(f"--{needless[0]} says how to measure, which needs --model MODEL")
    return words[0], options, flags


def _choose(facts: dict[str, Any], options: Mapping[str, str]) -> None:
    """Only the coder that `--name` names; and where one is measured, there must be one."""
    coders: dict[str, Any] = facts.get("coders", {})
    if (name := options.get("name")) is not None and facts["loadable"]:
        if name not in coders:
            raise ConfigError(f"{facts['place']}: no coder {name!r} here. {did_you_mean(name, coders)}")
        facts["coders"], facts["joint"] = {name: coders[name]}, False
    elif "model" in options and len(coders) > 1 and not facts["joint"]:
        listed = ", ".join(list(coders)[:12]) + (", …" if len(coders) > 12 else "")
        raise ConfigError(f"{facts['place']}: holds {len(coders)} coders; say which to measure with --name: {listed}")


def _count_silent(facts: dict[str, Any], place: str, options: Mapping[str, str]) -> None:
    """Adds how many latents never fired, where files beside the weights say how often each did."""
    from unmix.formats.detection import choose_format
    from unmix.formats.loading import read_draft, resolve

    there = resolve(place)
    chosen = choose_format(there, options.get("format"))
    for name in chosen.coders(there):
        draft = read_draft(chosen, there, name)
        described = facts["coders"].get(name or draft.config.name)
        for statistic, lazy in draft.statistics.items() if described else ():
            if "frequency" in statistic or "sparsity" in statistic:
                # A logarithm is of the frequency + 1e-10.
                silent = lazy() <= -9.99 if statistic.startswith("log") else lazy() == 0
                described["never_fired"] = int(silent.sum())


def _measure(facts: dict[str, Any], place: str, options: Mapping[str, str], thorough: bool) -> SelfCheck | None:
    """L0 and FVU on the model; None where the coder does not load."""
    if not facts["loadable"]:
        return None
    numbers = {name: _whole(name, options[name]) for name in ("tokens", "context") if name in options}
    if facts["joint"] and {"hook", "write"} & options.keys():
        raise ConfigError(f"{place}: coders that write together are measured where their files say, not at --hook")
    from unmix.coder.coder_set import CoderSet
    from unmix.evaluate.sampling import SOURCE, TOKENS, context_of, sample_tokens
    from unmix.evaluate.self_check import self_check, self_check_set
    from unmix.formats import load, load_all
    from unmix.lm.load import load_model

    if facts["joint"]:
        coders = dict(load_all(place, options.get("format")))
    else:
        coders = {"": _moved(load(place, options.get("format"), options.get("name")), options)}
    lm = load_model(options["model"], dtype="float32")
    coders = {name: coder.to(lm.device) for name, coder in coders.items()}
    first = next(iter(coders.values()))
    context = numbers.get("context") or context_of(first.config, lm)
    text = options.get("text", SOURCE)
    tokens = sample_tokens(lm, text, numbers.get("tokens", TOKENS), context, first.config.input_policy)
    facts["measured_on"] = {"model": lm.name, "text": text, "tokens": tokens.numel(), "context": tokens.shape[1]}
    if facts["joint"]:
        return self_check_set(CoderSet(coders), lm, tokens)
    return self_check(first, lm, tokens, thorough=thorough)


def _moved(coder: SparseCoder, options: Mapping[str, str]) -> SparseCoder:
    from unmix.train.session import at_hooks

    if not {"hook", "write"} & options.keys():
        return coder
    reads = tuple(options["hook"].split(",")) if "hook" in options else coder.config.reads
    return at_hooks(coder, reads, tuple(options["write"].split(",")) if "write" in options else None)


def _whole(name: str, text: str) -> int:
    value = parse_count(text)
    if not isinstance(value, int) and not (isinstance(value, str) and value.isdigit()):
        raise ConfigError(f"--{name}: found {text!r}, expected a number such as 8192 or 8k")
    return int(value)
