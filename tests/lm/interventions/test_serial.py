"""Interventions to JSON and back; what is unknown is refused, with its place."""

from __future__ import annotations

import json

import pytest
import torch

import unmix
from unmix.core.errors import ConfigError
from unmix.lm import Intervention

ALL: list[Intervention] = [
    unmix.Set(latent=123, value=8.0, where="generated"),
    unmix.Set(latent=[1, 2], value=[0.5, 0.9], units="quantile", coder="layers.3", evict=True),
    unmix.Add(latent=77, value=-2.0, where=[0, 4]),
    unmix.Multiply(latent=5, factor=0.25, where=unmix.Fires(latent=9, coder="b", above=1.5, within="prompt")),
    unmix.Multiply(latent=5, factor=2.0, where=unmix.Fires(latent=9, within=[3, 4])),
    unmix.Ablate(latent=3),
    unmix.Ablate(latent=3, to="mean"),
    unmix.Ablate(latent=[3, 4], to=[0.25, 1.5]),
    unmix.Clamp(latent=4, minimum=0.0),
    unmix.Clamp(latent=4, minimum=-1.0, maximum=3.0),
    unmix.Steer([0.1, -2.0, 1e-7], 4.0, hook="blocks.1.resid_post", where="generated"),
    unmix.Steer(torch.tensor([1.0, 0.1]), hook="layers.1"),
    unmix.Steer(latent=12, scale=3.0, coder="a"),
]


def test_every_kind_goes_there_and_back() -> None:
    text = unmix.interventions_to_json(ALL)
    again = unmix.interventions_from_json(text)
    assert again == ALL
    assert unmix.interventions_to_json(again) == text
    assert unmix.interventions_from_json(json.loads(text)) == ALL
    for one, other in zip(ALL, [*ALL[1:], ALL[0]]):
        assert one != other


def test_the_form_is_plain() -> None:
    found = json.loads(unmix.interventions_to_json([ALL[0], ALL[3], ALL[5]]))
    assert found == [
        {"do": "set", "where": "generated", "latent": 123, "value": 8.0},
        {
            "do": "multiply",
            "where": {"fires": {"latent": 9, "coder": "b", "above": 1.5, "within": "prompt"}},
            "latent": 5,
            "factor": 0.25,
        },
        {"do": "ablate", "latent": 3},
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "interventions: not JSON"),
        ("3", "expected a list of objects, found int"),
        ("[3]", r"interventions\[0\]: expected an object, found int"),
        ('[{"latent": 3}]', r"interventions\[0\]: do is nothing. Allowed: set, add"),
        ('[{"do": "sett", "latent": 3}]', r"do is 'sett'. Did you mean 'set'"),
        ('[{"do": "ablate", "latnt": 3}]', r"unknown field 'latnt'. Did you mean 'latent'"),
        ('[{"do": "ablate"}]', r"interventions\[0\]: latent is missing"),
        ('[{"do": "ablate", "latent": 1}, {"do": "set", "latent": 3}]', r"interventions\[1\]: value is missing"),
        ('[{"do": "set", "latent": "3", "value": 1}]', "latent is '3'; expected whole numbers"),
        ('[{"do": "set", "latent": 3, "value": true}]', "value is True; expected numbers"),
        ('[{"do": "set", "latent": 3, "value": 1, "where": 4}]', "where is 4; expected a word or positions"),
        ('[{"do": "set", "latent": 3, "value": 1, "where": {"fire": 4}}]', r"where: expected {\"fires\""),
        ('[{"do": "ablate", "latent": 3, "where": {"fires": {"latent": 4, "over": 1}}}]', "unknown field 'over'"),
        ('[{"do": "set", "latent": -3, "value": 1}]', r"interventions\[0\]: latent is -3; latents count from 0"),
        ('[{"do": "steer", "scale": 3}]', "Steer needs a vector with its hook, or a latent"),
        ('[{"do": "set", "latent": 3, "value": NaN}]', "not finite"),
        ('[{"do": ["set"], "latent": 3}]', r"do is \['set'\]. Did you mean"),
        ('[{"do": "set", "latent": 3, "value": null}]', "value is None; expected numbers"),
        ('[{"do": "multiply", "latent": null, "factor": 2}]', "latent is None; expected whole numbers"),
        ('[{"do": "steer", "latent": [1, 2]}]', r"latent is \[1, 2\]; expected a whole number"),
        ('[{"do": "steer", "latent": 1, "scale": [2]}]', r"scale is \[2\]; expected a number"),
        ('[{"do": "steer", "vector": 3, "hook": "embeddings"}]', "vector is 3; expected a list of numbers"),
        (
            '[{"do": "ablate", "latent": 3, "where": {"fires": {"latent": [4]}}}]',
            r"fires: latent is \[4\]; expected a ",
        ),
        ('[{"do": "ablate", "latent": 3, "where": {"fires": {"latent": 4, "above": null}}}]', "above is None"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        unmix.interventions_from_json(text)


def test_a_kind_of_ones_own_has_no_json_form() -> None:
    with pytest.raises(ConfigError, match="Intervention has no JSON form"):
        unmix.interventions_to_json([Intervention()])
