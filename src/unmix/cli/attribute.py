"""`unmix attribute`: which latents a model's next token comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unmix.cli._words import Words, coders_of, read_words
from unmix.core.errors import ConfigError

if TYPE_CHECKING:
    from unmix.lm.attribute.result import Attribution

USAGE = """usage: unmix attribute MODEL CODER PROMPT [--target TOKEN] [options]

Prints the latents that a metric of the model's next token comes from, with their effects: the metric as it is less the
metric with the latent at its baseline. Positive: the latent raises it. What coders leave over of the activation (their
error) is listed apart. MODEL: Hugging Face name or folder, GGUF file, builtin:smollm2. CODER: whatever `unmix inspect`
opens; all coders of the place take part.

  --target TOKEN    as text (" Paris", with its space); default: the likeliest next token
  --against TOKEN   the metric is the logit of the target less that of this one
  --metric METRIC   logit (default), logprob, logit_difference (with --against), loss (of the prompt's own tokens)
  --position N      where the logits are read (default -1, the last token)
  --method METHOD   gradient (default: slope × activation, one backward pass), ig (integrated gradients; says how well
                    the effects add up), patch (measured: one pass a latent and position)
  --steps N         points of ig (default 16)
  --corrupt PROMPT  baselines are what this prompt of as many tokens has (default: zero)
  --error MODE      keep (default: the model as it is) or drop (reconstructions in place of activations)
  --check N         measure the N strongest by patching, and print both
  --top N           rows (default 20)
  --per WHAT        latent (default: summed over positions) or position
  --json FILE       everything, as JSON (-: to stdout, in place of the table)

A sparse feature circuit over the coders of the place, with error nodes:
  --circuit FOLDER  writes circuit.json, circuit.svg and curve.svg (faithfulness and completeness by size)
  --node-threshold X --edge-threshold X     least effect and least weight, in units of the metric (0.1 and 0.01)
  --nodes N         nodes at most (default 200)
  --positions WHAT  each (default) or sum: a node is a latent at a place, or wherever it fires

  --name CODERS     only these coders of the place (commas)
  --format FORMAT   how to read CODER, where several formats fit
  --dtype DTYPE --device DEVICE     default: float32
"""
_CIRCUIT = ("node-threshold", "edge-threshold", "nodes", "positions")
_OPTIONS = (
    "target", "against", "metric", "position", "method", "steps", "corrupt", "error", "check", "top", "per", "json",
    "circuit", *_CIRCUIT, "name", "format", "dtype", "device",
)  # fmt: skip


def command(arguments: list[str]) -> int:
    """Attribute and print."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    asked = read_words(arguments, _OPTIONS, "attribute", ("MODEL", "CODER", "PROMPT"))
    per, top = _settings(asked)
    from unmix.lm.attribute.attributing import attribute, check_method
    from unmix.lm.load import load_model
    from unmix.lm.splice import error_mode

    method = check_method(asked.get("method", "gradient") or "", asked.whole("steps", 16) or 0, 1, asked.whole("check"))
    error = error_mode(asked.get("error", "keep") or "")
    model, place, prompt = asked.words
    coders = coders_of(place, asked.get("format"), asked.get("name"))
    lm = load_model(model, dtype=asked.get("dtype", "float32"), device=asked.get("device"))
    for coder in coders.values():
        coder.to(lm.device)
    metric: dict[str, Any] = {
        "target": asked.get("target"), "against": asked.get("against"), "metric": asked.get("metric"),
        "position": asked.whole("position", -1), "corrupt": asked.get("corrupt"), "steps": asked.whole("steps", 16),
    }  # fmt: skip
    with lm.bind(coders, error=error) as bound:
        found = attribute(bound, prompt, method=method, **metric)
        measured = None
        if (check := asked.whole("check")) is not None:
            measured = attribute(bound, prompt, method="patch", limit=check, **metric)
        if (folder := asked.get("circuit")) is not None:
            _circuit(bound, prompt, method, metric, Path(folder), asked)
    _write(found, measured, asked, per, top)
    return 0


def _settings(asked: Words) -> tuple[Literal["latent", "position"], int]:
    """How the table is made, and what can be said before anything is loaded."""
    per, top = asked.get("per", "latent"), asked.whole("top", 20)
    if per not in ("latent", "position"):
        raise ConfigError(f"--per {per}: allowed: latent, position")
    if top < 1:
        raise ConfigError(f"--top {top}: at least 1")
    needless = [name for name in _CIRCUIT if name in asked.options]
    if needless and "circuit" not in asked.options:
        raise ConfigError(f"--{needless[0]} is a setting of a circuit, which needs --circuit FOLDER")
    if "check" in asked.options and asked.get("method") == "patch":
        raise ConfigError("--check measures by patching, which --method patch does already")
    if "circuit" in asked.options and asked.get("method") == "patch":
        raise ConfigError("--circuit needs slopes: --method gradient or ig")
    return ("position" if per == "position" or "check" in asked.options else "latent"), top


def _circuit(bound: Any, prompt: str, method: str, metric: dict[str, Any], folder: Path, asked: Words) -> None:
    from unmix.lm.attribute.circuits import find_circuit

    found = find_circuit(
        bound, prompt, method=method, node_threshold=asked.number("node-threshold", 0.1),
        edge_threshold=asked.number("edge-threshold", 0.01), limit=asked.whole("nodes", 200),
        positions=asked.get("positions", "each") or "", **metric,
    )  # fmt: skip
    found.to_json(folder / "circuit.json")
    found.to_svg(folder / "circuit.svg")
    found.curve_svg(folder / "curve.svg")
    sys.stderr.write(
        f"circuit: {len(found.nodes)} nodes, {len(found.edges)} edges, faithfulness {found.faithfulness:.3f}, "
        f"completeness {found.completeness:.3f}; {folder / 'circuit.svg'}\n"
    )


def _write(found: Attribution, measured: Attribution | None, asked: Words, per: Any, top: int) -> None:
    target = asked.get("json")
    if target is not None:
        import json

        tree = found.to_dict()
        if measured is not None:
            tree["measured"] = measured.to_dict()
        if target == "-":
            sys.stdout.write(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
            return
        from unmix.core.atomic import write_json

        write_json(target, tree)
    sys.stdout.write("\n".join(_lines(found, measured, per, top)) + "\n")


def _lines(found: Attribution, measured: Attribution | None, per: Any, top: int) -> list[str]:
    prompt = " ".join(repr(token)[1:-1] for token in found.tokens[0])
    lines = [f"{found.metric} = {float(found.value[0]):.4g} after {prompt}"]
    if found.bare is not None:
        lines.append(f"(without coders {float(found.bare[0]):.4g}: with error drop, effects are of the spliced model)")
    exact = {} if measured is None else {_key(e): e.effect for e in measured.top(10**9, "position")}
    rows = found.top(top, per)
    width = max([len(row.coder) for row in rows] + [5])
    head = f"{'effect':>9}" + (f"  {'measured':>9}" if exact else "") + f"  {'coder':<{width}}  latent  activation  at"
    lines += ["", head]
    for row in rows:
        beside = f"  {exact[_key(row)]:>+9.4f}" if _key(row) in exact else f"  {'':>9}" if exact else ""
        place = repr(row.token) + ("" if row.position is None else f" ({row.position})")
        lines.append(f"{row.effect:>+9.4f}{beside}  {row.coder:<{width}}  {row.latent:>6}  {row.value:>10.4g}  {place}")
    if found.errors_at:
        lines += ["", f"{'effect':>9}  error left over at"]
        lines += [f"{e.effect:>+9.4f}  {e.hook} (most at {e.token!r})" for e in found.errors()]
    for name, part in found.completeness.items():
        lines.append(f"{name}: effects add up to {part.effects:+.4f}, measured {part.measured:+.4f}")
    if measured is not None:
        lines += ["", _agreement(found, measured)]
    return lines


def _agreement(found: Attribution, measured: Attribution) -> str:
    from unmix.lm.attribute.result import agreement

    said = agreement(found, measured)
    return (
        f"{found.method} against patching, {said.nodes} nodes: correlation {said.latents:.3f} over latents, "
        f"{said.pearson:.3f} with errors; largest gap {said.largest_gap:.3g}, largest effect {said.scale:.3g}"
    )


def _key(row: Any) -> tuple[str, int, int | None]:
    return row.coder, row.latent, row.position
