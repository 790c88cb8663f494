"""Padded batches run like their texts alone, in every family, spliced and steered."""

from __future__ import annotations

import pytest
import torch

import unmix
from unmix.coder.config import Temporal
from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm import LanguageModel
from unmix.lm.padding import pad_left

from .fakes import topk_coder
from .families import CONFIGS, some_tokens, tiny

ROWS = [some_tokens(1, n, seed=n)[0] for n in (3, 8, 5)]
ACTS = [
    unmix.Set(latent=5, value=3.0, where=[1, 4]),
    unmix.Add(latent=3, value=2.0, where="generated"),
    unmix.Multiply(latent=7, factor=3.0, where="prompt"),
    unmix.Steer(latent=11, scale=2.0),
    unmix.Steer(torch.ones(16), 0.5, hook="layers.0", where=[0, 2]),
]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_batch_of_prompts_writes_what_each_writes_alone(family: str) -> None:
    """Past sliding windows of 4 too."""
    lm = tiny(family)
    tokens, mask = pad_left(ROWS, 0)
    coder = topk_coder("layers.1", 16, input_policy=InputPolicy(bos="none", skip_first=1, skip_ids=(int(ROWS[1][4]),)))
    with lm.bind(coder, interventions=ACTS) as bound:
        found = bound.generate_tokens(tokens, 6, attention_mask=mask, stop_ids=())
        alone = [bound.generate_tokens(row.unsqueeze(0), 6, stop_ids=())[0] for row in ROWS]
    assert torch.equal(found, torch.stack(alone))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_codes_of_padded_rows(side: str) -> None:
    lm = tiny("gpt2")
    tokens, mask = pad_left(ROWS, 0)
    assert mask is not None
    if side == "right":
        tokens, mask = [torch.stack([t[i].roll(-int((~mask[i]).sum())) for i in range(3)]) for t in (tokens, mask)]
    with lm.bind(topk_coder("layers.1", 16), interventions=ACTS) as bound, torch.no_grad():
        out = bound(tokens, attention_mask=mask)
        raw = bound.raw(tokens, attention_mask=mask)
        for i, row in enumerate(ROWS):
            alone = bound(row.unsqueeze(0))
            torch.testing.assert_close(out.logits[i][mask[i]], alone.logits[0], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(raw[i][mask[i]], lm.logits(row.unsqueeze(0))[0], atol=2e-5, rtol=1e-4)
            codes = out.codes["layers.1"].dense()[i][mask[i]]
            torch.testing.assert_close(codes, alone.codes["layers.1"].dense()[0], atol=2e-5, rtol=1e-4)


def test_prompts_of_one_length_need_no_mask() -> None:
    tokens, mask = pad_left([ROWS[0], ROWS[0]], 9)
    assert mask is None and tokens.shape == (2, 3)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([[1, 1, 1]], r"attention_mask is \[1, 3\], the tokens are \[2, 4\]"),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], "padding inside a text, or on both sides"),
        ([[0, 1, 1, 0], [1, 1, 1, 1]], "padding inside a text, or on both sides"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "leaves a row without any token"),
    ],
)
def test_masks_that_make_no_sense(mask: list[list[int]], says: str) -> None:
    with tiny("llama").bind(topk_coder("layers.1", 16)) as bound, pytest.raises(ModelError, match=says):
        bound(some_tokens(2, 4), attention_mask=mask)


def test_what_cannot_be_padded() -> None:
    right = torch.tensor([[True, True, False], [True, True, True]])
    with tiny("llama").bind(topk_coder("layers.1", 16)) as bound:
        with pytest.raises(ModelError, match="padded on the left for generation"):
            bound.generate_tokens(some_tokens(2, 3), 4, attention_mask=right)
        with pytest.raises(ModelError, match="packed documents and padding do not go together"):
            apart = topk_coder("layers.1", 16, input_policy=InputPolicy(bos="none", attend_across=False))
            with tiny("llama").bind(apart) as other:
                other(some_tokens(2, 3), torch.zeros(2, 3, dtype=torch.int64), attention_mask=right)
    rule = Temporal(k=4, n_heads=2, bottleneck=4, z_scale=1.0)
    looking_back = unmix.SparseCoder(
        unmix.CoderConfig(reads=("blocks.1.resid_post",), d_in=16, n_latents=32, activation=rule)
    ).eval()
    with tiny("llama").bind(looking_back) as bound, pytest.raises(ModelError, match="looks at earlier tokens"):
        bound(some_tokens(2, 3), attention_mask=right)

    class Words:
        def __len__(self) -> int:
            return 100

    plain = LanguageModel(torch.nn.Sequential(torch.nn.Embedding(100, 16)), "plain", Words())
    with plain.bind(topk_coder("0@out", 16)) as bound, pytest.raises(ModelError, match="cannot be told about padding"):
        bound(some_tokens(2, 3), attention_mask=right)
