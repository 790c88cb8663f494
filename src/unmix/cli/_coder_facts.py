"""The facts of `unmix inspect` in words: a label and what belongs to it, at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmix.evaluate.self_check import Reading, SelfCheck

_WIDTH = 100
_LABEL = 12
_TENSORS, _FILES, _CODERS, _READINGS = 14, 8, 24, 8
"""How many of each are listed."""
_BARE = "(one tensor)"
"""What stands for the name of a tensor that is its whole file."""


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts in words, a label and what belongs to it."""
    shown = [*_line("place", facts["place"]), *_line("format", ", ".join(facts["formats"]) or "none recognised")]
    shown += _line("from", _origin(facts["origin"]))
    shown += _tensor_lines(facts["tensors"])
    if not facts["loadable"]:
        return [*shown, *_line("refused", facts["refused"])]
    coders: dict[str, Any] = facts["coders"]
    if facts["joint"]:
        shown += _line("together", f"{len(coders)} coders whose writes add up")
    if len(coders) == 1:
        return [*shown, *_coder_lines(*next(iter(coders.items())))]
    shown += _line("coders", f"{len(coders)}; --name CODER says more of one")
    width = max(len(name) for name in coders)
    for name, described in list(coders.items())[:_CODERS]:
        coder = described["coder"]
        hooks = (
            f"{_some(coder['reads'], 1)} → {_some(coder['writes'], 1)}" if _moves(coder) else _some(coder["reads"], 2)
        )
        sizes = f"{coder['n_latents']:,} latents × {coder['d_in']}"
        shown += _line("", f"{name:<{width}}  {sizes}  {_activation(coder['activation'])}  {hooks}", wrap=False)
    return [*shown, *_line("", f"… {len(coders) - _CODERS} more" if len(coders) > _CODERS else "")]


def _origin(origin: Mapping[str, Any]) -> str:
    if origin.get("scheme") in (None, "local"):
        return ""
    parts = [str(origin.get("repo") or origin.get("url") or "")]
    parts += [f"{key} {str(origin[key])[:12]}" for key in ("revision", "sha256") if origin.get(key)]
    release = origin.get("release") or {}
    parts += [f"{key} {release[key]}" for key in ("name", "id", "licence") if release.get(key)]
    return ", ".join(part for part in parts if part)


def _tensor_lines(files: Mapping[str, Any]) -> list[str]:
    shown: list[str] = []
    for file, tensors in list(files.items())[:_FILES]:
        if not isinstance(tensors, dict):
            shown += _line("tensors", f"{file}: {tensors}")
            continue
        broken = [name for name, t in tensors.items() if t.get("nan") or t.get("inf")]
        listed = list(dict.fromkeys([*broken, *tensors]))[:_TENSORS]
        width = max((len(name or _BARE) for name in listed), default=0)
        shown += _line("tensors", file)
        for name in listed:
            tensor = tensors[name]
            bad = [f"{tensor[k]:,} {word}" for k, word in (("nan", "NaN"), ("inf", "infinite")) if tensor.get(k)]
            faults = f"  {' and '.join(bad)}" if bad else ""
            what = f"{tensor['dtype']} {_shape(tensor['shape'])}"
            shown += _line("", f"  {name or _BARE:<{width}}  {what}{faults}", wrap=False)
        if len(tensors) > len(listed):
            shown += _line("", f"  … {len(tensors) - len(listed)} more")
    return [*shown, *_line("", f"… {len(files) - _FILES} more files of tensors" if len(files) > _FILES else "")]


def _coder_lines(name: str, described: Mapping[str, Any]) -> list[str]:
    coder, health = described["coder"], described["health"]
    normalise, training = coder["normalise"], coder["training"]
    b_dec = {"tied": ", b_dec subtracted", "own": ", b_pre subtracted"}.get(coder["pre_bias"], ", nothing subtracted")
    facts = [
        ("coder", name),
        ("reads", _some(coder["reads"], 6)),
        ("writes", _some(coder["writes"], 6) if _moves(coder) else "what it reads"),
        ("model", (coder["model"] or {}).get("name") or "not said"),
        ("sizes", f"d_in={coder['d_in']} n_latents={coder['n_latents']} d_out={coder['d_out']}, "
                  f"{described['parameters']:,} parameters"),
        ("activation", _activation(coder["activation"])),
        ("gate", "on z" if coder["gate_space"] == "raw" else f"on z × {coder['gate_space'].replace('_', ' ')}"),
        ("input", f"normalise {_normalise(normalise)}, × {coder['input_scale']:.6g}{b_dec}"),
        ("output", f"× {coder['output_scale']:.6g}{', plus W_skip of the input' if coder['skip'] else ''}"),
        ("decoder", _norms(health, "decoder")),
        ("encoder", _norms(health, "encoder")),
        ("alignment", _alignment(health)),
        ("threshold", _spread(health["threshold"]) if "threshold" in health else ""),
        *[("statistic", f"{key.replace('_', ' ')}: {_spread(value)}") for key, value in _statistics(coder, health)],
        ("silent", f"{described['never_fired']:,} of {coder['n_latents']:,} latents never fired in training"
                   if "never_fired" in described else ""),
        ("fed", _policy(coder["input_policy"])),
        ("trained on", _trained_on(training)),
        ("published", ", ".join(f"{_name(k)} {v}" for k, v in (training.get("published") or {}).items())),
    ]  # fmt: skip
    return [line for label, text in facts for line in _line(label, text)]


def check_lines(found: SelfCheck | None, where: Mapping[str, Any], thorough: bool) -> list[str]:
    """The readings as a table, the verdict and its causes."""
    if found is None:
        return _line("self-check", "not measured: load refuses this coder")
    rows: list[tuple[str, str, str]] = []
    if found.published:
        rows.append(("published", _figure(found.published.get("l0")), _figure(found.published.get("fvu"))))
    hooks = " + ".join(dict.fromkeys([*found.stated.reads[:2], *found.stated.writes[:2]]))
    rows.append((f"{found.stated.what} ({hooks})", _figure(found.stated.l0), _figure(found.stated.fvu)))
    # Without a cause it is a part of what is stated; other readings of a coder that agrees are of little interest.
    others = [r for r in found.others if thorough or not found.agrees or not r.cause]
    rows += [_row(reading) for reading in others[:_READINGS]]
    width = min(66, max(len(row[0]) for row in rows))
    table = [
        f"{'':<{width}}  {'L0':>8}  {'FVU':>8}",
        *(f"{_cut(a, width):<{width}}  {b:>8}  {c:>8}" for a, b, c in rows),
    ]
    if len(others) > _READINGS:
        table.append(f"… {len(others) - _READINGS} more; --json has them all")
    text = f"on {where['model']}, {found.tokens:,} tokens of {where['text']} in contexts of {where['context']}"
    shown = _line("self-check", text)
    for row in table:
        shown += _line("", row, wrap=False)
    if found.agrees:
        said = (
            "agrees with what was published" if found.published else "agrees with its hooks; no L0 or FVU is published"
        )
        return [*shown, *_line("verdict", said)]
    shown += _line("verdict", f"does not agree: {'; '.join(found.disagreements)}")
    for cause in found.causes:
        shown += _line("cause", cause)
    none = "no other reading that was tried fits; the text, the model or the files may be others"
    return [*shown, *([] if found.causes else _line("cause", none))]


def _row(reading: Reading) -> tuple[str, str, str]:
    return reading.what, _figure(reading.l0), _figure(reading.fvu)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2g}"


def _activation(activation: Mapping[str, Any]) -> str:
    hidden = ("kind", "initial_threshold", "bandwidth")
    shown = [f"{key}={value}" for key, value in activation.items() if key not in hidden and value not in (None, False)]
    return " ".join([activation["kind"], *shown])


def _normalise(normalise: Mapping[str, Any]) -> str:
    if normalise["kind"] == "none":
        return "none"
    back = "" if normalise["restore"] else ", not undone after"
    details = f" (eps {normalise['eps']:g}, ddof {normalise['ddof']})" if normalise["kind"] == "layer_norm" else ""
    return f"{normalise['kind']}{details}{back}"


def _norms(health: Mapping[str, Any], side: str) -> str:
    zero = health[f"zero_{side}_rows"]
    return f"row norms {_spread(health[f'{side}_norms'])}" + (f", {zero:,} rows of zeros" if zero else "")


def _alignment(health: Mapping[str, Any]) -> str:
    cosine = health.get("median_encoder_decoder_cosine")
    return "" if cosine is None else f"median cosine of a latent's encoder and decoder rows {cosine:.3g}"


def _statistics(coder: Mapping[str, Any], health: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, float]]]:
    own = ("decoder_norms", "encoder_norms", "threshold")
    return [(key, value) for key, value in health.items() if isinstance(value, dict) and key not in own]


def _spread(values: Mapping[str, float]) -> str:
    low, high = (f"{values[key]:.4g}" for key in ("min", "max"))
    return low if low == high else f"{low} to {high}, median {values['median']:.4g}"


def _policy(policy: Mapping[str, Any]) -> str:
    bos = {"none": "no BOS", "context": "BOS before each context", "document": "BOS before each document"}
    first = policy["skip_first"]
    skipped = "the first token of each masked" if first == 1 else f"the first {first} tokens of each masked"
    return f"{bos[policy['bos']]}, {skipped}" + (
        f", {len(policy['skip_ids'])} ids masked" if policy["skip_ids"] else ""
    )


def _trained_on(training: Mapping[str, Any]) -> str:
    data = training.get("data")
    data = data if isinstance(data, dict) else {}
    text, size = training.get("dataset") or data.get("source"), training.get("context_size") or data.get("context")
    return ", ".join([*([str(text)] if text else []), *([f"contexts of {size} tokens"] if size else [])])


def _moves(coder: Mapping[str, Any]) -> bool:
    return list(coder["writes"]) != list(coder["reads"])


def _name(key: str) -> str:
    return {"l0": "L0", "fvu": "FVU"}.get(key, key)


def _some(names: Sequence[str], n: int) -> str:
    return ", ".join([*names[:n], *([f"… ({len(names) - n} more)"] if len(names) > n else [])])


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _line(label: str, text: str, wrap: bool = True) -> list[str]:
    """`label  text`, wrapped at 100 columns or cut there; nothing where there is no text."""
    if not text.strip():
        return []
    room = _WIDTH - _LABEL
    if not wrap:
        return [f"{label:<{_LABEL}}{_cut(text, room)}".rstrip()]
    parts = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return [f"{label if i == 0 else '':<{_LABEL}}{part}".rstrip() for i, part in enumerate(parts)]
