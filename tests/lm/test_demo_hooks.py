"""Points, views and padding on the demo's real model."""

from __future__ import annotations

import pytest
import torch

import unmix
from unmix.lm import LanguageModel

pytestmark = pytest.mark.model

TEXTS = ["The capital of France is", "Water boils at a hundred degrees when the pressure is that of the sea", "Once"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return unmix.load_model("builtin:smollm2", dtype="float32")


def test_every_point_of_a_block_adds_up(lm: LanguageModel) -> None:
    tokens = lm.encode_text(TEXTS[0])
    points = [
        "resid_pre",
        "attn_in",
        "z",
        "attn_out_post",
        "resid_mid",
        "mlp_in",
        "mlp_act",
        "mlp_out_post",
        "resid_post",
    ]
    acts = {p: lm.capture(tokens, f"blocks.12.{p}")[f"blocks.12.{p}"] for p in points}
    close = {"atol": 1e-3, "rtol": 1e-4}
    torch.testing.assert_close(acts["resid_pre"] + acts["attn_out_post"], acts["resid_mid"], **close)
    torch.testing.assert_close(acts["resid_mid"] + acts["mlp_out_post"], acts["resid_post"], **close)
    block = lm.model.model.layers[12]
    torch.testing.assert_close(block.self_attn.o_proj(acts["z"]), acts["attn_out_post"], **close)
    torch.testing.assert_close(block.mlp.down_proj(acts["mlp_act"]), acts["mlp_out_post"], **close)
    normed = lm.capture(tokens, "blocks.12.ln2.hook_normalized")["blocks.12.ln2.hook_normalized"]
    torch.testing.assert_close(normed * block.post_attention_layernorm.weight, acts["mlp_in"], **close)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_are_as_if_alone(lm: LanguageModel, side: str) -> None:
    rows = [lm.encode_text(text) for text in TEXTS]
    longest = max(map(len, rows))
    tokens, mask = torch.zeros(3, longest, dtype=torch.int64), torch.zeros(3, longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    found = lm.capture(tokens, "layers.9", positions=mask, attention_mask=mask)["layers.9"]
    alone = torch.cat([lm.capture(row, "layers.9")["layers.9"][0] for row in rows])
    # The first token's stream is thousands wide; what counts is the error beside each row's own size.
    assert float(((found - alone).norm(dim=-1) / alone.norm(dim=-1)).max()) < 1e-4
