"""Cross-entropy, KL, agreement and recovered shares: by hand, chunk-free, invariant, loud on NaN."""

from __future__ import annotations

import math

import pytest
import torch

from unmix.core.errors import ConfigError, NonFiniteError
from unmix.metrics import language
from unmix.metrics.language import Language, TokenLosses, logits_rows, predictions, token_losses


def losses_of(logits, tokens, mask, original=None) -> TokenLosses:
    """Losses of `logits` beside `original`, or as the original."""
    if original is None:
        return token_losses(tokens, mask, logits_rows(logits), {})["original"]
    return token_losses(tokens, mask, logits_rows(original), {"it": logits_rows(logits)})["it"]


def logits_of(rows: list[list[float]]) -> torch.Tensor:
    """One context whose positions have these probabilities."""
    return torch.tensor([rows], dtype=torch.float64).log()


def test_next_token_shift_and_mask():
    mask = torch.tensor([[False, True, True], [True, True, True]])
    assert predictions(mask).tolist() == [[False, True, False], [True, True, False]]
    # Position 0 gives token 1 the probability 1/4; position 1 gives token 0 1/2; the last predicts nothing.
    logits = logits_of([[0.75, 0.25], [0.5, 0.5], [0.99, 0.01]])
    tokens = torch.tensor([[0, 1, 0]])
    losses = losses_of(logits, tokens, torch.ones(1, 3, dtype=torch.bool))
    assert losses.ce.tolist() == pytest.approx([math.log(4), math.log(2)])
    assert losses.kl is None and losses.agrees is None


def test_kl_direction_and_agreement():
    p, q = [0.5, 0.5], [0.25, 0.75]
    tokens, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    losses = losses_of(logits_of([q, q]), tokens, mask, original=logits_of([p, p]))
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert forward != pytest.approx(backward, rel=1e-2)
    assert losses.kl is not None and losses.kl.tolist() == pytest.approx([forward])
    other = losses_of(logits_of([q, q]), tokens, mask, original=logits_of([[0.9, 0.1]] * 2))
    assert other.agrees is not None and other.agrees.tolist() == [0.0]
    same = losses_of(logits_of([q, q]), tokens, mask, original=logits_of([q, q]))
    assert same.agrees is not None and same.agrees.tolist() == [1.0]
    assert same.kl is not None and same.kl.tolist() == [0.0]


def test_recovered_by_hand():
    # original says the truth with 1/2, spliced 1/4, ablated 1/8: CE log 2, log 4, log 8.
    def sharp(p: float) -> torch.Tensor:
        return logits_of([[p, 1 - p], [0.5, 0.5]])

    tokens, mask = torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool)
    original = sharp(0.5)
    metric = Language(["zero", "mean"])
    spliced = losses_of(sharp(0.25), tokens, mask, original)
    ablated = losses_of(sharp(0.125), tokens, mask, original)
    metric.update(losses_of(original, tokens, mask), spliced, {"zero": ablated, "mean": spliced}, torch.tensor([5]))
    result = metric.result()
    assert result["ce_orig"] == pytest.approx(math.log(2))
    assert result["ce_increase"] == pytest.approx(math.log(2))
    assert result["ce_recovered"] == pytest.approx(0.5)
    assert result["ce_recovered_mean"] == pytest.approx(0.0)
    assert result["ce_ablated_zero"] == pytest.approx(math.log(8))
    kl = [-0.5 * math.log(2 * p) - 0.5 * math.log(2 * (1 - p)) for p in (0.25, 0.125)]
    assert result["kl_recovered"] == pytest.approx(1 - kl[0] / kl[1])
    assert metric.n_predictions == 1


def batch(seed: int = 0) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    original, spliced, ablated = (torch.randn(6, 9, 11, generator=rng) for _ in range(3))
    tokens = torch.randint(0, 11, (6, 9), generator=rng)
    mask = torch.rand(6, 9, generator=rng) > 0.2
    return original, spliced, ablated, tokens, mask


def fed(metric: Language, rows: list[int]) -> Language:
    original, spliced, ablated, tokens, mask = (t[rows] for t in batch())
    contexts = torch.tensor(rows)[predictions(mask).nonzero()[:, 0]]
    metric.update(
        losses_of(original, tokens, mask),
        losses_of(spliced, tokens, mask, original),
        {"zero": losses_of(ablated, tokens, mask, original)},
        contexts,
    )
    return metric


def test_against_torch_and_chunks(monkeypatch):
    original, spliced, _, tokens, mask = batch()
    scored = predictions(mask)
    whole = losses_of(spliced, tokens, mask, original)
    expected = torch.nn.functional.cross_entropy(
        spliced[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1), reduction="none"
    ).view(6, 8)[scored[:, :-1]]
    assert torch.allclose(whole.ce, expected.double(), atol=1e-6)
    monkeypatch.setattr(language, "CHUNK_BYTES", 4 * 11 * 3)
    chunked = losses_of(spliced, tokens, mask, original)
    for name in ("ce", "kl", "agrees"):
        assert torch.equal(getattr(whole, name), getattr(chunked, name))


def test_batches_and_merge_order_do_not_matter():
    whole = fed(Language(["zero"]), [0, 1, 2, 3, 4, 5])
    for order in ([3, 1, 0], [5, 4, 2]), ([5, 4, 2], [3, 1, 0]):
        total = Language(["zero"])
        for rows in order:
            total.merge(fed(Language(["zero"]), rows))
        assert total.intervals(seed=2) == whole.intervals(seed=2)
    estimate = whole.intervals()["ce_spliced"]
    assert estimate.low is not None and estimate.low < estimate.value < estimate.high


def test_no_masked_position_and_bfloat16():
    original, spliced, _, tokens, mask = batch()
    none = losses_of(spliced, tokens, torch.zeros_like(mask), original)
    assert len(none.ce) == 0
    half = losses_of(spliced.bfloat16(), tokens, mask, original.bfloat16())
    wide = losses_of(spliced.bfloat16().float(), tokens, mask, original.bfloat16().float())
    assert torch.equal(half.ce, wide.ce)
    assert Language().result() == {} and Language().intervals() == {}


def test_undefined_recovery_is_none():
    original, _, _, tokens, mask = batch()
    metric = Language(["zero"])
    same = losses_of(original, tokens, mask, original)
    metric.update(losses_of(original, tokens, mask), same, {"zero": same})
    assert metric.result()["ce_recovered"] is None
    assert metric.result()["kl_recovered"] is None
    assert metric.result()["ce_increase"] == 0.0


def test_errors():
    original, spliced, _, tokens, mask = batch()
    mask[:] = True
    spliced[2, 4, 1] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        losses_of(spliced, tokens, mask, original)
    assert str(caught.value) == (
        "it logits: 1 predictions with non-finite cross-entropy, first nan at context 2 of the batch, position 4"
    )
    plain = losses_of(original, tokens, mask)
    with pytest.raises(ConfigError, match=r"ablations \['zero'\], expected \['mean'\]"):
        Language(["mean"]).update(plain, plain, {"zero": plain})
    with pytest.raises(ConfigError, match="have no KL"):
        Language([]).update(plain, plain, {})
