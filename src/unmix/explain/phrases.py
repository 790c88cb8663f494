"""From a pattern to one short line that a person gets at a glance: `"the" after "of"`, `forms of "compute"`.

What is shown: the heaviest parts first, whole words instead of pieces of words, tokens of the same context
together, `often` and `sometimes` where a part is right less than about two times in three, and how much is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from unmix.explain.nouns import KIND_MANY, KIND_ONE, families, family_name, listed, quoted, token_name
from unmix.explain.patterns import Pattern, Rule, Slot

SURE, LIKELY = 0.6, 0.3
"""Share of right matches from which a part is stated plainly, or with "often"; below: "sometimes"."""
PARTS, NAMES, CONTEXTS = 3, 4, 3
"""Most parts in a line, names in a part, contexts in a name's "after"."""
LENGTH = 100
"""Characters from which further parts are left out."""
SMALL = 0.2
"""A part with less than this share of the first one's activation is left out."""
MOST, ALMOST_ALL = 0.8, 0.92
"""Names that hold this share of a part stand for it: "mostly …" instead of a count of the others, or nothing."""
LITTLE = 0.3
"""Covered share of the activation below which the line says that it is not the whole story."""


@dataclass
class Part:
    """Things that are said together: names with weights, under one context and one qualifier."""

    qualifier: str
    contexts: list[tuple[str, float]]
    names: list[tuple[str, float]] = field(default_factory=lambda: [])
    """Written words, merged with their inflections when the line is made."""
    fixed: list[tuple[str, float]] = field(default_factory=lambda: [])
    """Finished phrases: kinds of token, parts of words."""

    @property
    def mass(self) -> float:
        """Share of the latent's activation."""
        return sum(weight for _, weight in [*self.names, *self.fixed])


def sentence(pattern: Pattern) -> str:
    """The line for a pattern; empty for a pattern without rules."""
    parts: dict[tuple[str, str], Part] = {}
    for rule in pattern.rules:
        _add(parts, rule)
    ordered = sorted(_join_contexts(list(parts.values())), key=lambda part: -part.mass)
    if not ordered:
        return ""
    shown = [part for part in ordered[:PARTS] if part.mass >= SMALL * ordered[0].mass]
    phrases = [_phrase(part, alone=len(shown) == 1) for part in shown]
    while len(phrases) > 1 and len("; ".join(phrases)) > LENGTH:
        phrases.pop()
    covered = sum(part.mass for part in shown[: len(phrases)])
    return "; ".join(phrases) + (", among others" if covered < LITTLE else "")


def _add(parts: dict[tuple[str, str], Part], rule: Rule) -> None:
    trigger = next((slot for slot in rule.slots if slot.back == 0), None)
    before = [slot for slot in rule.slots if slot.back > 0]
    if trigger is not None and trigger.level != "kind":
        before = _outside_word(rule, trigger, before)
    context = context_phrase(before, skipped=trigger is None)
    qualifier = "" if rule.share >= SURE else "often " if rule.share >= LIKELY else "sometimes "
    part = parts.setdefault((qualifier, context), Part(qualifier, []))
    weight = max(rule.mass, 1e-9)
    if context:
        part.contexts = [(context, weight + sum(w for _, w in part.contexts))]
    if trigger is None:
        part.fixed.append((_anything(before), weight))
    elif trigger.level == "kind":
        part.fixed.append((listed([KIND_MANY[text] for text in trigger.texts], "and"), weight))
    else:
        names, fixed = _written(rule, trigger)
        part.names += [(name, weight * share) for name, share in names]
        part.fixed += [(name, weight * share) for name, share in fixed]


def _outside_word(rule: Rule, trigger: Slot, before: Sequence[Slot]) -> list[Slot]:
    """Context slots that are not the beginning of the trigger's own written word."""
    total = sum(count for _, count in rule.words)
    heads = [text.strip().casefold() for text in trigger.texts]
    kept: list[Slot] = []
    for expected, slot in enumerate(sorted(before, key=lambda s: s.back), 1):
        heads = [text.strip().casefold() + head for head in heads for text in slot.texts if text.strip()]
        held = sum(count for word, count in rule.words if any(head in word.casefold() for head in heads))
        if kept or slot.back != expected or 2 * held <= total:
            kept.append(slot)
    return kept


def _written(rule: Rule, trigger: Slot) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Words to show for a rule with a literal trigger, and phrases where it is a part of many words."""
    total = sum(count for _, count in rule.words)
    piece = trigger.texts[0].strip()
    if not total or not piece or not piece.isalnum():
        return [(text, 1 / len(trigger.texts)) for text in trigger.texts], []
    shares: dict[str, tuple[str, float]] = {}
    for word, count in rule.words:
        name, share = shares.get(word.casefold(), (word, 0.0))
        shares[word.casefold()] = (name, share + count / total)
    best = sorted(shares.values(), key=lambda w: -w[1])
    frequent = [(word, share) for word, share in best[:3] if share >= 0.2]
    if sum(share for _, share in frequent) >= 0.55:
        return frequent, []
    return [], [(_part_of_words(piece, [word for word, _ in best]), 1.0)]


def _part_of_words(piece: str, words: Sequence[str]) -> str:
    folded, low = [word.casefold() for word in words], piece.casefold()
    if low in folded and len(words) < 3:
        return quoted(piece)
    where = "in"
    if all(word.startswith(low) for word in folded):
        where = "at the start of"
    elif all(word.endswith(low) for word in folded):
        where = "at the end of"
    examples = listed([quoted(word) for word in words if word.casefold() != low][:2], "and")
    return f"{quoted(piece)} {where} {examples}" if examples else quoted(piece)


def _anything(before: Sequence[Slot]) -> str:
    nearest = min(slot.back for slot in before)
    return {1: "any token", 2: "the 2nd token", 3: "the 3rd token"}[nearest]


def context_phrase(before: Sequence[Slot], skipped: bool = False) -> str:
    """`after "one of"`, `after a number`, `after "from … import"`; empty where there is none.

    `skipped`: tokens between the nearest slot and the firing token are counted elsewhere ("the 2nd token after").
    """
    if not before:
        return ""
    slots = sorted(before, key=lambda s: -s.back)
    runs: list[list[str]] = [[]]
    """Alternating literal runs and other phrases, farthest first."""
    phrases: list[str] = []
    last = slots[0].back + 1
    for slot in slots:
        gap = slot.back < last - 1
        last = slot.back
        if slot.level != "kind" and len(slot.texts) == 1 and slot.texts[0].strip():
            if gap:
                runs[-1].append(" … ")
            runs[-1].append(_spaced(slot))
        else:
            _close(runs, phrases)
            phrases.append(_slot_name(slot))
    if last > 1 and not skipped:
        if runs[-1]:
            runs[-1].append(" …")
        else:
            phrases.append("anything")
    _close(runs, phrases)
    return "after " + ", then ".join(phrases)


def _close(runs: list[list[str]], phrases: list[str]) -> None:
    text = " ".join("".join(runs[-1]).split())
    if text:
        phrases.append(quoted(text))
    runs.append([])


def _spaced(slot: Slot) -> str:
    text = slot.texts[0]
    return f" {text}" if slot.level == "form" and text[:1].isalnum() else text


def _slot_name(slot: Slot) -> str:
    names = [KIND_ONE[text] if slot.level == "kind" else token_name(text) for text in slot.texts]
    names = list(dict.fromkeys(names))
    if len(names) > CONTEXTS:
        names = [*names[: CONTEXTS - 1], "the like"]
    return listed(names, "or")


def _join_contexts(parts: list[Part]) -> list[Part]:
    """Parts that say the same of different contexts become one: `"the" after "of" or "in"`."""
    joined: list[Part] = []
    for part in parts:
        same = (p for p in joined if p.contexts and part.contexts and p.qualifier == part.qualifier)
        twin = next((p for p in same if _names(p) == _names(part)), None)
        if twin is None:
            joined.append(part)
            continue
        twin.contexts += part.contexts
        twin.names += part.names
        twin.fixed += part.fixed
    return joined


def _names(part: Part) -> set[str]:
    return {name.casefold() for name, _ in [*part.names, *part.fixed]}


def _phrase(part: Part, alone: bool) -> str:
    found = [(family_name(words), weight, len(words)) for words, weight in families(part.names)]
    fixed: dict[str, float] = {}
    for name, weight in part.fixed:
        fixed[name] = fixed.get(name, 0.0) + weight
    found += [(name, weight, 1) for name, weight in fixed.items()]
    found = _numbers_together(found)
    found.sort(key=lambda f: -f[1])
    total = sum(weight for _, weight, _ in found)
    names: list[str] = []
    held = 0.0
    for name, weight, _ in found[:NAMES]:
        if names and (weight < 0.05 * total or held > 0.9 * total):
            break
        names.append(name)
        held += weight
    left = sum(count for _, _, count in found[len(names) :])
    text = _names_text(names, left, held / total, part.qualifier)
    if alone and text.startswith('"') and text.count('"') == 2 and not (part.contexts or part.qualifier):
        text = ("the word " if text.strip('"').isalpha() else "the token ") + text
    return f"{part.qualifier}{text}{_contexts(part.contexts)}"


def _names_text(names: Sequence[str], left: int, held: float, qualifier: str) -> str:
    if not left:
        return listed(names, "or")
    if held >= MOST:
        plain = qualifier or held >= ALMOST_ALL
        return listed(names, "or") if plain else f"mostly {listed(names, 'or')}"
    return f"{', '.join(names)} and {left} more"


def _contexts(contexts: Sequence[tuple[str, float]]) -> str:
    """Simple contexts before those with "then"; what is left out is said where it matters."""
    if not contexts:
        return ""
    ordered = sorted(contexts, key=lambda c: (", then " in c[0], -c[1]))
    simple = [context for context in ordered if ", then " not in context[0]][:CONTEXTS]
    shown = simple or ordered[:1]
    held = sum(weight for _, weight in shown) / sum(weight for _, weight in contexts)
    names = list(dict.fromkeys(context.removeprefix("after ") for context, _ in shown))
    more = "" if held >= MOST else " and in other contexts"
    return f" after {listed(names, 'or')}{more}"


def _numbers_together(found: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
    numbers = [f for f in found if f[0].strip('"').isdecimal()]
    if len(numbers) < 4:
        return found
    examples = ", ".join(name for name, _, _ in sorted(numbers, key=lambda f: -f[1])[:2])
    rest = [f for f in found if f not in numbers]
    return [*rest, (f"numbers ({examples}, …)", sum(weight for _, weight, _ in numbers), 1)]
