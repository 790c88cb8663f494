"""`unmix graph`: an attribution graph of one prompt, through transcoders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmix.core.config import parse_count
from unmix.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from unmix.lm.graphs.graph import AttributionGraph, Edge, Node

USAGE = """usage: unmix graph MODEL CODERS [CODERS …] "PROMPT" [--target TOKEN]… [--out FILE.json] [--picture FILE.svg]

Which latents, through which, made MODEL say what it says after PROMPT. CODERS are transcoders, one a layer or a
cross-layer set: places as for `unmix load` (folders, hf://…, release:NAME/ID). Layers without one count as errors.

  --target TOKEN     a next token to explain, as text or id (repeat for several; default: the likeliest)
  --against TOKEN    explain the difference to this token's logit (default: to the mean logit)
  --latents N        latents whose own causes are worked out (default 1000)
  --nodes SHARE      keep the nodes that carry this share of the influence (default 0.8)
  --edges SHARE      and of the edges between them (default 0.98)
  --measure          take each node out of the model and put what its targets lose beside each edge
  --attention        for the strongest edges between positions: which heads, and what made them look there
  --out FILE.json    the kept graph, as circuit-tracer and Neuronpedia read it
  --picture FILE.svg the kept graph as a picture
  --dtype DTYPE      of the model (default float32: bfloat16 effects are off by a percent or so)
  --memory BYTES     for the stored pass, e.g. 4G (default 2G)
"""
_FLAGS = ("measure", "attention")
_OPTIONS = ("target", "against", "latents", "nodes", "edges", "out", "picture", "dtype", "memory")
_SHOWN = 12


def command(arguments: list[str]) -> int:
    """Build, prune, print and write the graph."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    words, options, flags = _parse(arguments)
    if len(words) < 3:
        raise ConfigError('graph needs MODEL, CODERS and a "PROMPT": unmix graph MODEL CODERS "PROMPT"')
    model, *places, prompt = words
    numbers = _numbers(options)
    for name, suffix in (("out", ".json"), ("picture", ".svg")):
        if name in options and Path(options[name][0]).suffix != suffix:
            raise ConfigError(f"--{name} is {options[name][0]!r}; expected a file that ends in {suffix}")
    from unmix.lm.graphs.build import attribution_graph, token_id
    from unmix.lm.graphs.replacement import LocalReplacement
    from unmix.lm.load import load_model

    coders = _coders(places)
    lm = load_model(model, dtype=options.get("dtype", ["float32"])[0])
    for coder in coders.values():
        coder.to(lm.device)
    targets = [_token(word) for word in options.get("target", [])] or None
    against = token_id(lm, _token(options["against"][0])) if "against" in options else None
    whole = attribution_graph(
        lm, coders, prompt, targets=targets, against=against, max_latents=int(numbers["latents"]),
        memory=int(numbers["memory"]), progress=_progress,
    )  # fmt: skip
    graph = whole.prune(numbers["nodes"], numbers["edges"])
    replacement = LocalReplacement(lm, coders, prompt, int(numbers["memory"])) if flags else None
    if replacement is not None and "measure" in flags:
        from unmix.lm.graphs.measure import measured

        graph = measured(graph, replacement, against)
    sys.stdout.write(_shown(graph, whole))
    if replacement is not None and "attention" in flags:
        from unmix.cli._attention import attention_lines

        sys.stdout.write("\n".join(attention_lines(graph, replacement, against)) + "\n")
    if "out" in options:
        graph.save(options["out"][0])
        sys.stdout.write(f"graph    {options['out'][0]}\n")
    if "picture" in options:
        graph.picture(options["picture"][0])
        sys.stdout.write(f"picture  {options['picture'][0]}\n")
    return 0


def _parse(arguments: list[str]) -> tuple[list[str], dict[str, list[str]], set[str]]:
    words: list[str] = []
    options: dict[str, list[str]] = {}
    flags: set[str] = set()
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("--"):
            words.append(word)
            continue
        name, given, value = word[2:].partition("=")
        if name in _FLAGS:
            flags.add(name)
            continue
        if name not in _OPTIONS:
            raise ConfigError(f"unknown option --{name}. {did_you_mean(name, (*_OPTIONS, *_FLAGS))}")
        found = value if given else next(rest, None)
        if found is None:
            raise ConfigError(f"--{name} needs a value")
        if name in options and name != "target":
            raise ConfigError(f"--{name} is given twice")
        options.setdefault(name, []).append(found)
    return words, options, flags


def _numbers(options: dict[str, list[str]]) -> dict[str, float]:
    found: dict[str, float] = {"latents": 1000, "nodes": 0.8, "edges": 0.98, "memory": 2 << 30}
    for name in found:
        if name in options:
            text = options[name][0]
            try:
                found[name] = float(text) if name in ("nodes", "edges") else parse_count(text)
            except ValueError:
                raise ConfigError(f"--{name} is {text!r}, expected a number") from None
    for name in ("nodes", "edges"):
        if not 0 < found[name] <= 1:
            raise ConfigError(f"--{name} is {found[name]:g}; allowed: above 0, up to 1")
    return found


def _token(word: str) -> int | str:
    return int(word) if word.isascii() and word.isdigit() else word


def _coders(places: list[str]) -> Any:
    from unmix.coder.coder_set import CoderSet
    from unmix.formats import load_all

    found = [load_all(place) for place in places]
    if len(found) == 1:
        return found[0]
    joint = [place for place, coders in zip(places, found, strict=True) if isinstance(coders, CoderSet)]
    if joint:
        raise ConfigError(f"{joint[0]}: the coders of a set write together; give it alone")
    together: dict[str, Any] = {}
    for place, coders in zip(places, found, strict=True):
        for name, coder in coders.items():
            if name in together:
                raise ConfigError(f"{place}: a second coder of the name {name!r}")
            together[name] = coder
    return together


def _progress(done: int, waiting: float) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} latents worked out; {waiting:.1%} of the influence enters others ")
        sys.stderr.flush()


def _shown(graph: AttributionGraph, whole: AttributionGraph) -> str:
    """Logits, their strongest causes, and how far the graph can be trusted."""
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    scores = whole.scores()
    lines = [f"prompt   {graph.prompt!r}"]
    for i, node in enumerate(graph.nodes):
        if node.kind == "logit":
            start = f"next     {node.token!r}  probability {node.probability:.3f}"
            lines += ["", f"{start}  logit over the base {node.activation:+.2f}"]
            lines += [_cause(graph.nodes[edge.source], edge) for edge in graph.into(i)[:_SHOWN]]
    lines += [
        "",
        f"kept     {len(graph.nodes)} of {len(whole.nodes)} nodes, {len(graph.edges)} of {len(whole.edges)} edges",
        f"of what reaches the logits {scores['replacement']:.1%} comes from tokens, the rest from errors",
        f"of what enters any node, {scores['completeness']:.1%} is explained by latents and tokens",
        f"{whole.unexpanded:.1%} of the influence enters latents that were not worked out (--latents)",
        *_dropped(whole),
        "",
    ]
    return "\n".join(lines)


def _dropped(whole: AttributionGraph) -> list[str]:
    """What is said where more than the last thousandth of a row went."""
    if whole.dropped < 0.002:
        return []
    return [f"of one target up to {whole.dropped:.1%} came from effects too many and too small to keep"]


def _cause(source: Node, edge: Edge) -> str:
    after = "" if edge.measured is None else f"  measured {edge.measured:+8.3f}"
    what = {"latent": f"latent {source.latent}", "embedding": "token"}.get(source.kind, source.kind)
    at = "" if source.kind == "embedding" else f"layer {source.layer}"
    where = f"at {source.position} {source.token!r}"
    return f"  {edge.weight:+8.3f}{after}  {at:<9} {what:<14} {where}  {source.label}".rstrip()
