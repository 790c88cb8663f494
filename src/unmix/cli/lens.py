"""`unmix lens`: latents read through the unembedding; a Jacobian lens fitted to a hook."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from unmix.cli._words import Words, coders_of, read_words
from unmix.core.errors import ConfigError

USAGE = """usage: unmix lens fit MODEL HOOK --out FOLDER [options]
       unmix lens show MODEL CODER LATENT[,LATENT…] [options]

fit: the mean Jacobian of the stream after the last block with respect to HOOK, over a text. It stands in for the later
blocks where the logit lens leaves them out. Leaves lens.safetensors and a manifest in FOLDER.
  --out FOLDER      where it goes
  --data SOURCE     file, folder, hf:NAME or builtin:python-docs (default)
  --tokens N        tokens to average over (default 8192)
  --context N       tokens a context (default 128)
  --targets WHICH   later (default: the effect on this and every later position) or same (this position alone)
  --passes N        batches that each row of the Jacobian is averaged over (default 4): what the time goes by, since it
                    takes as many backward passes as the stream is wide, times N
  --batch N         contexts at once (default 1): memory is one batch's graph
  --seed N          of dealing out rows and of signs

show: the tokens that latents raise and lower, by their decoder rows and the unembedding; the final norm's gain is
folded in and its scale left out unless --at says where to take it.
  --lens FOLDER     read through a fitted lens too
  --at TEXT --position N     scales of the norms there (without --position: means over the text)
  --top N           tokens on each side (default 10)
  --set WORDS       token-set enrichment of these words (commas); default: sets by spelling
  --neighbours N    latents of the nearest decoder rows (default 5; 0: none)
  --effect TOKENS   ablate each latent over this many tokens of --data: KL, loss, changed tokens
  --json FILE       everything, as JSON (-: to stdout)
  --name CODER --format FORMAT     one coder of the place, how to read it

  --dtype DTYPE --device DEVICE    default: float32
"""
_SHARED = ("data", "tokens", "context", "dtype", "device", "batch")
_FIT = ("out", "targets", "passes", "seed", *_SHARED)
_SHOW = ("lens", "at", "position", "top", "set", "neighbours", "effect", "json", "name", "format", "data", "context",
         "dtype", "device")  # fmt: skip


def command(arguments: list[str]) -> int:
    """Fit a lens, or look at latents."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        return 0
    if arguments[0] == "fit":
        return _fit(read_words(arguments[1:], _FIT, "lens fit", ("MODEL", "HOOK")))
    if arguments[0] == "show":
        return _show(read_words(arguments[1:], _SHOW, "lens show", ("MODEL", "CODER", "LATENT")))
    raise ConfigError(f"lens takes fit or show, found {arguments[0]!r}")


def _fit(asked: Words) -> int:
    out = asked.get("out")
    if out is None:
        raise ConfigError("lens fit needs --out FOLDER, where the lens goes")
    from unmix.core.manifest import refuse_foreign
    from unmix.evaluate.sampling import SOURCE, sample_tokens
    from unmix.lm.attribute.jacobian import KIND, fit_jacobian
    from unmix.lm.load import load_model
    from unmix.lm.tokens import default_policy

    refuse_foreign(out, KIND)
    model, hook = asked.words
    lm = load_model(model, dtype=asked.get("dtype", "float32"), device=asked.get("device"))
    lm.hook(hook)
    policy = default_policy(lm.tokenizer)
    tokens = sample_tokens(
        lm, asked.get("data", SOURCE) or SOURCE, asked.whole("tokens", 8192) or 0, asked.whole("context"), policy
    )
    found = fit_jacobian(
        lm, hook, tokens, policy, targets=asked.get("targets", "later") or "", passes=asked.whole("passes", 4),
        batch=asked.whole("batch", 1) or 0, seed=asked.whole("seed", 0) or 0,
    )  # fmt: skip
    found.save(out)
    sys.stdout.write(
        f"mean Jacobian {list(found.jacobian.shape)} of {lm.last_hook} by {found.hook}, "
        f"over {found.tokens:,} positions\n{out}\n"
    )
    return 0


def _show(asked: Words) -> int:
    try:
        latents = [int(word) for word in asked.words[2].split(",")]
    except ValueError:
        raise ConfigError(f"{asked.words[2]!r}: latents are whole numbers with commas between them") from None
    top, near = asked.whole("top", 10) or 0, asked.whole("neighbours", 5) or 0
    if top < 1:
        raise ConfigError(f"--top {top}: at least 1")
    if "position" in asked.options and "at" not in asked.options:
        raise ConfigError("--position is a place in a text: give --at TEXT too")
    needless = [name for name in ("data", "context") if name in asked.options and "effect" not in asked.options]
    if needless:
        raise ConfigError(f"--{needless[0]} is of the text that latents are ablated over: give --effect TOKENS too")
    from unmix.lm.attribute.direct import check_latents, direct_logits
    from unmix.lm.attribute.jacobian import JacobianLens
    from unmix.lm.load import load_model

    model, place, _ = asked.words
    coder = _one(place, asked)
    check_latents(coder, latents)
    lens = None if asked.get("lens") is None else JacobianLens.load(asked.options["lens"])
    lm = load_model(model, dtype=asked.get("dtype", "float32"), device=asked.get("device"))
    coder = coder.to(lm.device)
    if lens is not None:
        lens.check(lm)
    position = asked.whole("position") if "position" in asked.options else None
    direct = direct_logits(lm, coder, latents, at=asked.get("at"), position=position)
    through = (
        None if lens is None else direct_logits(lm, coder, latents, at=asked.get("at"), position=position, lens=lens)
    )
    facts = _facts(lm, coder, latents, direct, through, asked, top, near)
    target = asked.get("json")
    if target == "-":
        sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return 0
    if target is not None:
        from unmix.core.atomic import write_json

        write_json(target, facts)
    sys.stdout.write("\n".join(_lines(facts)) + "\n")
    return 0


def _one(place: str, asked: Words) -> Any:
    coders = coders_of(place, asked.get("format"), asked.get("name"))
    if len(coders) > 1:
        raise ConfigError(f"{place}: holds {len(coders)} coders; say which with --name: {', '.join(list(coders)[:12])}")
    return next(iter(coders.values()))


def _facts(
    lm: Any, coder: Any, latents: list[int], direct: Any, through: Any, asked: Words, top: int, near: int
) -> dict[str, Any]:
    from unmix.lm.attribute.enrichment import as_token_set, token_set_enrichment, token_sets
    from unmix.lm.attribute.neighbours import decoder_neighbours

    words = asked.get("set")
    sets = token_sets(lm) if words is None else {words: as_token_set(lm, [w.strip() for w in words.split(",")])}
    known = range(min(lm.vocab_size, len(lm.tokenizer)))
    enriched = token_set_enrichment(direct, sets, known)
    shape = direct.statistics()
    found = decoder_neighbours(coder, latents, near) if near else [[] for _ in latents]
    effects = _effects(lm, coder, latents, asked)
    rows: list[dict[str, Any]] = []
    for i, latent in enumerate(latents):
        own = sorted((e for e in enriched if e.latent == latent), key=lambda e: -abs(e.z))
        row: dict[str, Any] = {
            "latent": latent,
            "raises": [asdict(t) for t in direct.top(top)[i]],
            "lowers": [asdict(t) for t in direct.bottom(top)[i]],
            "shape": {name: float(value[i]) for name, value in shape.items()},
            "sets": [asdict(e) for e in own],
            "neighbours": [asdict(n) for n in found[i]],
        }
        if through is not None:
            row["lens"] = {
                "raises": [asdict(t) for t in through.top(top)[i]],
                "lowers": [asdict(t) for t in through.bottom(top)[i]],
            }
        if effects is not None:
            row["ablation"] = asdict(effects[i])
        rows.append(row)
    return {"model": lm.name, "coder": coder.config.name, "scale": direct.scale, "cap": direct.cap, "latents": rows}


def _effects(lm: Any, coder: Any, latents: list[int], asked: Words) -> Any:
    if "effect" not in asked.options:
        return None
    from unmix.evaluate.sampling import SOURCE, context_of, sample_tokens
    from unmix.lm.attribute.ablation import ablation_effect

    context = asked.whole("context", context_of(coder.config, lm))
    count = asked.whole("effect", 0) or 0
    tokens = sample_tokens(lm, asked.get("data", SOURCE) or SOURCE, count, context, coder.config.input_policy)
    return ablation_effect(lm, coder, latents, tokens)


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"direct logits at an activation of 1; scale of the last norm: {facts['scale']}"]
    if facts["cap"] is not None:
        lines.append(f"before the model's soft cap at {facts['cap']:g}")
    for row in facts["latents"]:
        lines += ["", f"latent {row['latent']}", f"  raises  {_tokens(row['raises'])}"]
        lines.append(f"  lowers  {_tokens(row['lowers'])}")
        if "lens" in row:
            lines.append(f"  through the lens raises  {_tokens(row['lens']['raises'])}")
            lines.append(f"  through the lens lowers  {_tokens(row['lens']['lowers'])}")
        shape = row["shape"]
        lines.append(f"  skewness {shape['skewness']:.2f}, kurtosis {shape['kurtosis']:.2f}")
        for found in row["sets"][:3]:
            lines.append(f"  set {found['name']}: auc {found['auc']:.3f}, z {found['z']:+.1f}, q {found['q']:.2g}")
        if row["neighbours"]:
            near = ", ".join(f"{n['latent']} ({n['cosine']:.2f})" for n in row["neighbours"])
            lines.append(f"  nearest decoder rows  {near}")
        if "ablation" in row:
            lines += _ablation(row["ablation"])
    return lines


def _ablation(found: dict[str, Any]) -> list[str]:
    said = (
        f"  without it: KL {found['kl']:.4g} nats at {found['firings']} firings in {found['contexts']} contexts, "
        f"{found['kl_after']:.4g} after them; loss {found['loss_increase']:+.4g}"
    )
    tokens = [f"{t['string']!r} {t['difference']:+.3f}" for t in found["raised"][:5]]
    less = [f"{t['string']!r} {t['difference']:+.3f}" for t in found["lowered"][:5]]
    return [said, f"    it raises  {', '.join(tokens)}", f"    it lowers  {', '.join(less)}"]


def _tokens(listed: list[dict[str, Any]]) -> str:
    return ", ".join(f"{t['string']!r} {t['logit']:+.3g}" for t in listed)
