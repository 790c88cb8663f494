"""Names for tokens in running text: quotes, words for white space, words for kinds."""

from __future__ import annotations

from collections.abc import Sequence

from unmix.metrics.windows import visible

KIND_MANY = {
    "number": "numbers", "line break": "line breaks", "space": "white space", "word": "lower-case words",
    "Capitalised": "capitalised words", "UPPERCASE": "upper-case words", "piece": "pieces of words",
    "Piece": "capitalised pieces of words", "quote": "quotation marks", "opening bracket": "opening brackets",
    "closing bracket": "closing brackets", "punctuation": "punctuation", "symbol": "symbols",
    "other": "unusual characters",
}  # fmt: skip
KIND_ONE = {
    "number": "a number", "line break": "a line break", "space": "white space", "word": "a lower-case word",
    "Capitalised": "a capitalised word", "UPPERCASE": "an upper-case word", "piece": "a piece of a word",
    "Piece": "a capitalised piece of a word", "quote": "a quotation mark", "opening bracket": "an opening bracket",
    "closing bracket": "a closing bracket", "punctuation": "punctuation", "symbol": "a symbol",
    "other": "an unusual character",
}  # fmt: skip


def quoted(text: str) -> str:
    """`text` in whichever quotes it does not hold itself; what is invisible made visible."""
    shown = visible(text)
    if '"' not in shown:
        return f'"{shown}"'
    return f"'{shown}'" if "'" not in shown else f"`{shown}`"


def token_name(text: str) -> str:
    """A token or word as a noun: `"return"`, `a line break`, `an indent of 4 spaces`, `the start of the text`."""
    if not text:
        return "the start of the text"
    if not text.strip():
        return _blank(text)
    return quoted(text.strip())


def _blank(text: str) -> str:
    breaks = text.count("\n")
    if breaks:
        name = "a line break" if breaks == 1 else "a blank line"
        return f"{name} and an indent" if text[-1] in " \t" else name
    if text == "\t":
        return "a tab"
    return "a space" if len(text) == 1 else f"an indent of {len(text)} spaces"


def listed(names: Sequence[str], last: str) -> str:
    """`a, b or c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def families(words: Sequence[tuple[str, float]]) -> list[tuple[list[str], float]]:
    """Words with weights, grouped with their inflections and case variants; the weightiest family first.

    Inflections (`akin`): field/fields, compute/computed/computing. A family lists its words by weight.
    """
    groups: list[dict[str, float]] = []
    for word, weight in sorted(words, key=lambda w: -w[1]):
        for group in groups:
            if any(akin(word, other) for other in group):
                spelling = next((other for other in group if other.casefold() == word.casefold()), word)
                group[spelling] = group.get(spelling, 0.0) + weight
                break
        else:
            groups.append({word: weight})
    result = [([w for w, _ in sorted(g.items(), key=lambda e: -e[1])], sum(g.values())) for g in groups]
    return sorted(result, key=lambda family: -family[1])


_SHORT = frozenset({"", "s", "es", "ed", "ing", "e"})
_LONG = _SHORT | {"d", "er", "ers", "ly", "ion", "ions", "ation", "ations"}
_NEVER = ({"", "e"}, {"e", "ly"})


def akin(a: str, b: str) -> bool:
    """Whether two words differ by case or by common English endings only; the shorter the stem, the fewer endings."""
    a, b = a.casefold(), b.casefold()
    if a == b:
        return True
    if not (a.isalpha() and b.isalpha()):
        return False
    stem = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    endings = {a[stem:], b[stem:]}
    if endings == {"y", "ies"}:
        return True
    if stem < 3 or endings in _NEVER:
        return False
    return endings <= (_LONG if stem >= 4 else _SHORT)


def family_name(words: Sequence[str]) -> str:
    """`"field"`, `"field"/"fields"` or `forms of "compute"`."""
    if len(words) == 1:
        return token_name(words[0])
    if len(words) == 2:
        return f"{token_name(words[0])}/{token_name(words[1])}"
    return f"forms of {token_name(min(words, key=len))}"
