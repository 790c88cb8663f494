"""Explainers: one file each, all of one of three shapes (`explainers/base.py`)."""

from __future__ import annotations

from unmix.core.plugins import Registry

EXPLAINERS = Registry(
    "unmix.explainers",
    "explainer",
    {
        "ngram": "unmix.explain.explainers.ngram:NgramExplainer",
        "tokens": "unmix.explain.explainers.tokens:TokensExplainer",
        "llm": "unmix.explain.explainers.llm:LLMExplainer",
        "random": "unmix.explain.explainers.random_baseline:RandomExplainer",
    },
)
