"""Explaining and scoring latents: with any language model, with none, and never with a lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.explain.choosing import choose_latents as choose_latents
    from unmix.explain.clients.openai import OpenAIClient as OpenAIClient
    from unmix.explain.ledger import Ledger as Ledger
    from unmix.explain.patterns import Pattern as Pattern
    from unmix.explain.pipeline import Coverage as Coverage
    from unmix.explain.pipeline import explain as explain
    from unmix.explain.pipeline import score as score
    from unmix.explain.ranking import ranked as ranked
    from unmix.explain.table import summary as summary

_EXPORTS = {
    "Coverage": "unmix.explain.pipeline",
    "Ledger": "unmix.explain.ledger",
    "OpenAIClient": "unmix.explain.clients.openai",
    "Pattern": "unmix.explain.patterns",
    "choose_latents": "unmix.explain.choosing",
    "explain": "unmix.explain.pipeline",
    "ranked": "unmix.explain.ranking",
    "score": "unmix.explain.pipeline",
    "summary": "unmix.explain.table",
}
_resolve = lazy_exports(_EXPORTS)


def __getattr__(name: str) -> Any:
    return _resolve(__name__, name)
