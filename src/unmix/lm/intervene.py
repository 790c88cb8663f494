"""Interventions in one place: what users make, what the splice does with it."""

from __future__ import annotations

from unmix.lm.interventions.acts import Ablate, Add, Clamp, Intervention, LatentIntervention, Multiply, Set
from unmix.lm.interventions.changes import LatentFacts, apply_all
from unmix.lm.interventions.distribution import LatentDistribution, measure_latents
from unmix.lm.interventions.places import Fires, Span, Where, rows_where
from unmix.lm.interventions.serial import interventions_from_json, interventions_to_json
from unmix.lm.interventions.steering import Steer

__all__ = [
    "Ablate", "Add", "Clamp", "Fires", "Intervention", "LatentDistribution", "LatentFacts", "LatentIntervention",
    "Multiply", "Set", "Span", "Steer", "Where", "apply_all", "interventions_from_json", "interventions_to_json",
    "measure_latents", "rows_where",
]  # fmt: skip
