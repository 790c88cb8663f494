"""`unmix steer`: what a model writes with and without interventions on latents, side by side."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmix.cli._interventions import KINDS, make_intervention, parse_where
from unmix.cli._words import Words, coders_of, read_words
from unmix.core.errors import ConfigError

if TYPE_CHECKING:
    from unmix.lm.interventions.acts import Intervention

USAGE = """usage: unmix steer MODEL CODER PROMPT [interventions] [options]

Lets the model continue PROMPT twice, as it is and with interventions on the coder's latents, and prints both side by
side. MODEL: Hugging Face name or folder, GGUF file, builtin:smollm2. CODER: whatever `unmix inspect` opens; all coders
of the place are bound (those of a cross-layer transcoder write as one).

Interventions, each as often as wanted, done in the order given; CODER:LATENT where several coders are bound:
  --set LATENT=VALUE        the latent has this value, whether it fired or not; it evicts no other
  --add LATENT=VALUE        this is added (to 0 where it is silent)
  --multiply LATENT=FACTOR  scaled where it fires
  --ablate LATENT[=mean]    0, or its mean, or the number given
  --clamp LATENT=LOW:HIGH   kept between two bounds, of which one may be left out
  --steer LATENT=SCALE      SCALE times the latent's decoder direction (norm 1) is added to the activation
  --interventions FILE      those of a JSON file, first
  --where WHERE             those above: at which positions: all (default), prompt, generated, or 0,3,5
  --units quantile          values are quantiles of the latent's own distribution (1.5: one and a half times its
                            maximum); needs --index
  --index FOLDER            a latent index of the coder: quantiles and means
  --kl TARGET               scale all interventions so that they move the prompt's next-token distributions by TARGET
                            nats on average (with --where generated those of the text generated without them)

Options:
  --tokens N                new tokens (default 40)
  --temperature T --top-k K --top-p P --repetition-penalty R --seed S       default: the likeliest token each time
  --error keep|drop         keep the coder's error (default): without interventions the model writes what it always
                            does; drop: reconstructions take the place of activations in both texts
  --name CODERS             where the place holds several: one, or more with commas
  --format FORMAT           how to read CODER, where several formats fit
  --dtype DTYPE --device DEVICE
  --json FILE               prompt, both texts and interventions, as JSON (-: to stdout, in place of the table)
"""
_OPTIONS = (
    "interventions", "where", "units", "index", "kl", "tokens", "temperature", "top-k", "top-p", "repetition-penalty",
    "seed", "error", "name", "format", "dtype", "device", "json",
)  # fmt: skip
_DRAWN = ("top-k", "top-p", "seed")


def command(arguments: list[str]) -> int:
    """Generate twice and print."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    asked = read_words(arguments, _OPTIONS, "steer", ("MODEL", "CODER", "PROMPT"), KINDS)
    acts = _interventions(asked)
    found = _run(asked, acts)
    target = asked.options.get("json")
    if target == "-":
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return 0
    if target is not None:
        from unmix.core.atomic import write_json

        write_json(target, found)
    sys.stdout.write("\n".join(_lines(found)) + "\n")
    return 0


def _interventions(asked: Words) -> list[Intervention]:
    from unmix.lm.intervene import interventions_from_json

    where, units = parse_where(asked.options.get("where", "all")), asked.options.get("units", "latent")
    if units not in ("latent", "quantile"):
        raise ConfigError(f"--units {units}: allowed: latent, quantile")
    if units == "quantile" and "index" not in asked.options:
        raise ConfigError("--units quantile needs --index FOLDER, a latent index of the coder")
    if units == "quantile" and not any(kind in ("set", "add", "clamp") for kind, _ in asked.again):
        raise ConfigError("--units quantile: only values of --set, --add and --clamp can be quantiles")
    if "where" in asked.options and not asked.again:
        raise ConfigError("--where is said of interventions of the command line; those of a file say their own")
    acts: list[Intervention] = []
    if (path := asked.options.get("interventions")) is not None:
        try:
            acts += interventions_from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--interventions {path}: cannot be read ({error})") from None
    acts += [make_intervention(kind, text, where, units) for kind, text in asked.again]
    if not acts:
        raise ConfigError("steer needs an intervention: --set 123=8, --add, --multiply, --ablate, --clamp or --steer")
    return acts


def _run(asked: Words, acts: list[Intervention]) -> dict[str, Any]:
    from unmix.lm.intervene import interventions_to_json
    from unmix.lm.interventions.places import range_of
    from unmix.lm.load import load_model

    model, place, prompt = asked.words
    options = _sampling(asked)
    tokens, target = asked.whole("tokens", 40), asked.number("kl")
    error: Any = asked.options.get("error", "keep")
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: expected at least 1")
    if error not in ("keep", "drop"):
        raise ConfigError(f"--error {error}: allowed: keep, drop")
    # On the prompt an intervention on what is generated would move nothing.
    over: Any = "generated" if all(range_of(act.where) == "generated" for act in acts) else "prompt"
    coders = coders_of(place, asked.options.get("format"), asked.options.get("name"))
    lm = load_model(model, dtype=asked.options.get("dtype"), device=asked.options.get("device"))
    for coder in coders.values():
        coder.to(lm.device)
    known = _distributions(asked, list(coders))
    with lm.bind(coders, error=error, distributions=known) as bound:
        bound.plan(acts)
        found = None
        if target is not None:
            found = bound.steer_to_kl(prompt, acts, target, over=over, new_tokens=tokens)
            acts = list(found.interventions)
        plain = bound.generate(prompt, tokens, **options)
        steered = bound.generate(prompt, tokens, interventions=acts, **options)
    return {
        "model": lm.name,
        "coders": list(coders),
        "prompt": prompt,
        "without": plain,
        "with": steered,
        "interventions": json.loads(interventions_to_json(acts)),
        "sampling": options,
        "kl": None if found is None
        else {"target": target, "found": found.kl, "strength": found.strength, "over": over},
    }  # fmt: skip


def _sampling(asked: Words) -> dict[str, Any]:
    """How tokens are chosen; `ConfigError` for options that would do nothing, or that do not fit."""
    from unmix.lm.sampling import Sampling

    given = {
        "temperature": asked.number("temperature"), "top_k": asked.whole("top-k"), "top_p": asked.number("top-p"),
        "repetition_penalty": asked.number("repetition-penalty"), "seed": asked.whole("seed"),
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    idle = [name for name in _DRAWN if name in asked.options]
    if Sampling(**options).temperature == 0 and idle:
        raise ConfigError(f"--{idle[0]} does nothing at temperature 0, the likeliest token; say --temperature too")
    return options


def _distributions(asked: Words, names: list[str]) -> dict[str, Any]:
    """What the index says of each bound coder; of the only one, whatever its name there."""
    if "index" not in asked.options:
        return {}
    from unmix.index import open_index

    index = open_index(asked.options["index"])
    if len(names) == 1 and len(index.names) == 1:
        return {names[0]: index.coder()}
    found = {name: index.coder(name) for name in names if name in index.names}
    if not found:
        raise ConfigError(f"--index {asked.options['index']}: holds {', '.join(index.names)}, not {', '.join(names)}")
    return found


def _lines(found: dict[str, Any]) -> list[str]:
    """Both texts in two columns, the interventions above them."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 200))
    half = (width - 3) // 2
    lines = [f"{_one(act)}" for act in found["interventions"]]
    if found["kl"] is not None:
        place = "prompt" if found["kl"]["over"] == "prompt" else "text generated without"
        lines.append(f"strength {found['kl']['strength']:.4g}: mean KL {found['kl']['found']:.4g} nats on the {place}")
    columns = [_wrapped(found["prompt"] + found[key], half) for key in ("without", "with")]
    lines += ["", f"{'without':<{half}} │ with", "─" * half + "─┼─" + "─" * half]
    lines += [f"{left:<{half}} │ {right}".rstrip() for left, right in zip_longest(*columns, fillvalue="")]
    return lines


def _one(act: dict[str, Any]) -> str:
    said = {key: value for key, value in act.items() if key != "do"}
    if isinstance(said.get("vector"), list):
        said["vector"] = f"[{len(said['vector'])} numbers]"
    return " ".join([act["do"], *[f"{key}={value}" for key, value in said.items()]])


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width`; what a terminal would obey is shown instead."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    lines: list[str] = []
    for line in shown.split("\n"):
        lines += textwrap.wrap(line, width, break_on_hyphens=False) or [""]
    return lines
