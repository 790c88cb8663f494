"""The comparison as lines of text."""

from __future__ import annotations

from unmix.index.differences.comparison import Difference, LatentDifference

_COLUMNS = (
    "latent", "more in", "log2 ratio", "95 %", "documents", "rate a", "rate b", "mean a", "mean b", "q", "tokens",
)  # fmt: skip
_LEFT = frozenset({"more in", "tokens"})


def table(found: Difference, rows: list[LatentDifference]) -> list[str]:
    """What was compared, what was found, and one aligned line a latent."""
    lines = [*_head(found), ""]
    if rows:
        cells = [_COLUMNS, *(_cells(row) for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
        for line in cells:
            shown = (
                text.ljust(width) if name in _LEFT else text.rjust(width)
                for name, text, width in zip(_COLUMNS, line, widths, strict=True)
            )
            lines.append("  ".join(shown).rstrip())
        lines.append("")
    for row in rows:
        if row.witnesses:
            lines += _witnesses(row)
    return lines


def _head(found: Difference) -> list[str]:
    lines: list[str] = []
    for letter, side in (("a", found.a), ("b", found.b)):
        counts = side.counts
        lines.append(
            f"{letter}  {_shown(side.name)}: {counts.n_documents:,} documents, {counts.tokens:,} tokens, "
            f"coder {side.coder.name}"
        )
    lines.append(
        f"{found.n_tested:,} of {len(found.evidence.p):,} latents tested (in at least {found.min_documents} "
        f"documents); {len(found.found):,} differ at q ≤ {found.q_below:g}"
    )
    return lines + [f"note: {_shown(remark)}" for remark in found.remarks]


def _cells(row: LatentDifference) -> tuple[str, ...]:
    low, high = row.interval
    return (
        str(row.latent), _shown(row.more), f"{row.log2_ratio:+.2f}", f"{low:+.2f} … {high:+.2f}",
        f"{row.documents[0]:,} / {row.documents[1]:,}", f"{row.rate[0]:.2e}", f"{row.rate[1]:.2e}",
        f"{row.mean[0]:.3g}", f"{row.mean[1]:.3g}", f"{row.q:.1e}", " ".join(map(_shown, row.top_tokens)),
    )  # fmt: skip


def _witnesses(row: LatentDifference) -> list[str]:
    lines = [f"latent {row.latent}, in {_shown(row.more)}"]
    for one in row.witnesses:
        words = one.strings or [f"<{token}>" for token in one.tokens]
        before, peak, after = words[: one.peak_at], words[one.peak_at], words[one.peak_at + 1 :]
        text = f"{''.join(before)}⟦{peak}⟧{''.join(after)}"
        lines.append(f"  document {one.document}, {one.peak:.3g}:  {_shown(text)}")
    return [*lines, ""]


def _shown(text: str) -> str:
    """Text of unknown origin on one line: control characters, and what they could do to a terminal, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
