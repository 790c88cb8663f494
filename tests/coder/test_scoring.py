"""bfloat16 scoring selects what the float32 path selects: in every row, on inputs made to fool it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmix.coder import scoring, sparse
from unmix.coder.activations.selection import Selector, ThresholdSelector, TopKSelector
from unmix.coder.certified import group_size
from unmix.coder.scoring import Product, Screen, below, hits, kth_largest, two_least
from unmix.coder.sparse_coder import SparseCoder

from .largest import Largest
from .makers import make_coder

Problem = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""x [n, d], W [F, d], b [F], gate scale [F]."""

RULES = {"signed": (False, False), "magnitude": (True, False), "relu before": (False, True)}


def duplicates(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """Every latent three times over, so that ties span the border."""
    F = len(W)
    return x, W[torch.arange(F) % (F // 3 + 1)], torch.zeros(F), None


def one_ulp(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """All latents within one unit in the last place of each other."""
    return x, torch.nextafter(W[:1].expand_as(W).clone(), W), torch.zeros_like(b), None


def twins(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """Pairs of latents one unit in the last place apart: close calls in float64, a coin's toss in float32."""
    again = W[torch.arange(len(W)) // 2]
    return x, torch.where((torch.arange(len(W)) % 2).bool()[:, None], torch.nextafter(again, W), again), 0 * b, None


def close(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """Latents that differ by less than bfloat16 can say."""
    return x, W[:1] + 1e-4 * W, torch.zeros_like(b), None


def cancelling(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """Large inputs along a direction that no latent looks at: bfloat16 keeps little of the score."""
    return x + 1000, W - W.mean(-1, keepdim=True), b, None


def outlier(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """One coordinate a thousand times the others."""
    return x * torch.cat([torch.full((1,), 1000.0), torch.ones(x.shape[1] - 1)]), W, b, None


def large_bias(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """Biases far above the products."""
    return x, W, 100 * b, None


def scaled(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """A gate in another space, with factors of zero."""
    return x, W, b, (b * 2).relu()


def uneven(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """Latents whose norms differ by orders of magnitude."""
    return x, W * (3 * b).exp().unsqueeze(-1), b, None


def whole(x: Tensor, W: Tensor, b: Tensor) -> Problem:
    """Small whole numbers: exact arithmetic and many ties."""
    return x.round(), W.round(), b.round(), None


def at(power: float) -> Callable[[Tensor, Tensor, Tensor], Problem]:
    """x scaled out to where float32 overflows or goes subnormal."""
    return lambda x, W, b: (x * 10.0**power, W, 0 * b, None)


PROBLEMS: dict[str, Callable[[Tensor, Tensor, Tensor], Problem]] = {
    "plain": lambda x, W, b: (x, W, b, None),
    "zeros": lambda x, W, b: (0 * x, W, 0 * b, None),
    "duplicates": duplicates, "one ulp": one_ulp, "twins": twins, "close": close,
    "cancelling": cancelling, "outlier": outlier, "large bias": large_bias, "scaled": scaled, "uneven": uneven,
    "whole": whole, "1e-42": at(-42), "1e-30": at(-30), "1e-12": at(-12), "1e30": at(30), "1e38": at(38),
}  # fmt: skip


def make(problem: str, n: int, d: int, F: int, seed: int) -> Problem:
    """A problem of this size."""
    generator = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(shape, generator=generator) for shape in ((n, d), (F, d), (F,)))
    return PROBLEMS[problem](x, W, b)


Make = Callable[[], Selector]


def best(k: int, rule: str) -> Make:
    """A top-k selector."""
    return lambda: TopKSelector(k, *RULES[rule])


def select(kind: scoring.Scoring, problem: Problem, selector: Make) -> tuple[Tensor, Tensor, Tensor]:
    """`(values, indices, offsets)` by one way of scoring."""
    x, W, b, scale = problem
    with scoring.scoring(kind), torch.no_grad():
        return sparse._select(x, W, b, scale, selector())


def assert_same(problem: Problem, selector: Make) -> scoring.Tally:
    """The same latents for every row, and values within the rounding of a float32 dot product."""
    with scoring.tally() as counted:
        values, indices, offsets = select("bfloat16", problem, selector)
    wanted, ids, edges = select("exact", problem, selector)
    assert torch.equal(indices, ids)
    assert torch.equal(offsets, edges)
    x, W, b, _ = problem
    rows = torch.arange(len(x)).repeat_interleave(offsets.diff())
    size = (x[rows].double() * W[ids.long()].double()).abs().sum(-1) + b[ids.long()].abs().double()
    # Two float32 dot products of d terms, each off by d + 1 roundings at most.
    off = (2 * (x.shape[1] + 2) * 2.0**-24 * size + 1e-37).float()
    finite = torch.isfinite(wanted)
    assert bool(((values - wanted).abs() <= off)[finite].all())
    assert torch.equal(values[~finite].isnan(), wanted[~finite].isnan())
    return counted


@settings(max_examples=100, deadline=None)
@given(
    problem=st.sampled_from(sorted(PROBLEMS)), rule=st.sampled_from(sorted(RULES)),
    n=st.integers(1, 60), d=st.integers(2, 70), F=st.integers(3, 300), share=st.floats(0, 1), seed=st.integers(0, 999),
)  # fmt: skip
def test_selected_latents_are_those_of_float32(
    problem: str, rule: str, n: int, d: int, F: int, share: float, seed: int
) -> None:
    """All sizes and problems; k runs from 1 to F."""
    k = max(1, round(share**3 * F))
    assert_same(make(problem, n, d, F, seed), best(k, rule))


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("problem", sorted(PROBLEMS))
def test_each_problem_over_several_tiles(problem: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not left to chance; 100 rows are six tiles, the last of 20 rows."""
    monkeypatch.setattr(sparse, "TILE_BYTES", 1)
    assert_same(make(problem, 100, 64, 512, 3), best(8, rule))
    assert_same(make(problem, 100, 64, 515, 4), best(1, rule))


@settings(max_examples=100, deadline=None)
@given(
    problem=st.sampled_from(sorted(PROBLEMS)), on_scores=st.booleans(), per_latent=st.booleans(),
    n=st.integers(1, 60), d=st.integers(2, 70), F=st.integers(3, 300), share=st.floats(0, 0.02),
    seed=st.integers(0, 999),
)  # fmt: skip
@example(problem="outlier", on_scores=False, per_latent=False, n=1, d=10, F=64, share=0.0, seed=11)
def test_thresholds_are_passed_by_the_same_latents(
    problem: str, on_scores: bool, per_latent: bool, n: int, d: int, F: int, share: float, seed: int
) -> None:
    """At a floor that few entries exceed, some of them by nothing at all: it is one of the scores."""
    given = make(problem, n, d, F, seed)
    x, W, b, scale = given
    z = x @ W.T + b
    gate = z if on_scores or scale is None else z * scale
    level = gate.nan_to_num(0, 0, 0).flatten().sort(descending=True).values[int(share * gate.numel())]
    floor = level + torch.randint(0, 2, (F,)) if per_latent else float(level)
    assert_same(given, lambda: ThresholdSelector(floor, on_scores))


def test_threshold_at_a_real_width() -> None:
    """Proven for nearly all rows where few latents fire; not even tried where many do."""
    given = make("plain", 400, 256, 2048, 0)
    counted = assert_same(given, lambda: ThresholdSelector(44.0))
    assert counted.rows == 400
    assert counted.again <= 20
    assert assert_same(given, lambda: ThresholdSelector(0.0)).rows == 0


def test_few_rows_are_scored_again() -> None:
    """At a real width most rows are proven without the float32 path; ties across the border never are."""
    counted = assert_same(make("plain", 400, 256, 2048, 0), best(16, "signed"))
    assert counted.rows == 400
    assert counted.again <= 40
    tied = assert_same(make("one ulp", 100, 64, 512, 0), best(8, "signed"))
    assert tied.again == tied.rows == 100


@pytest.mark.parametrize(("problem", "k"), [("twins", 7), ("duplicates", 8)])
def test_close_calls_are_settled_without_a_whole_row(problem: str, k: int) -> None:
    """A pair split by the border, or three that tie across it: float32's own scores of those alone tell."""
    counted = assert_same(make(problem, 200, 64, 512, 0), best(k, "signed"))
    assert counted.rows == 200
    assert counted.again <= 20


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(16, 200), d=st.integers(1, 700), F=st.integers(64, 700), rows=st.integers(1, 64),
    columns=st.integers(1, 200), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_corner_of_the_product_is_the_product_of_a_corner(
    n: int, d: int, F: int, rows: int, columns: int, seed: int
) -> None:
    """To the bit, as close calls need it: how a kernel sums must not depend on what else it multiplies."""
    x, W, b, _ = make("plain", n, d, F, seed)
    generator = torch.Generator().manual_seed(seed)
    some, ids = (torch.randperm(m, generator=generator)[:c].sort().values for m, c in ((n, rows), (F, columns)))
    whole = torch.mm(x, W.T, out=torch.empty(n, F)).add_(b)
    assert torch.equal(sparse._corner(x, W, b)(some, ids), whole[some][:, ids])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_takes_the_float32_path(bad: float) -> None:
    """In the input it costs its own row, in the weights all of them; it reaches the loss as before."""
    x, W, b, _ = make("plain", 40, 32, 256, 0)
    x[7, 3] = bad
    counted = assert_same((x, W, b, None), best(4, "signed"))
    assert 1 <= counted.again < 10
    W[9, 5] = bad
    values, indices, _ = select("bfloat16", (x, W, b, None), best(4, "signed"))
    wanted, ids, _ = select("exact", (x, W, b, None), best(4, "signed"))
    assert torch.equal(indices, ids)
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(problem=st.sampled_from(sorted(PROBLEMS)), d=st.integers(2, 300), seed=st.integers(0, 999))
def test_the_margins_hold(problem: str, d: int, seed: int) -> None:
    """float32 and bfloat16 scores of every pair stay within their bounds of the float64 ones."""
    x, W, b, scale = make(problem, 20, d, 64, seed)
    screen = Screen(x, W, b, scale)
    factor = 1.0 if scale is None else scale
    true = (x.double() @ W.double().T + b.double()) * factor
    single = (x @ W.T + b) * factor
    _, tile = next(screen.tiles(20))
    margins = screen.margins
    finite = torch.isfinite(margins.screen) & torch.isfinite(single)
    assert bool(((single - true).abs() <= margins.round_off)[finite].all())
    low = tile.double()
    assert bool(((low - single).abs() <= margins.screen + screen.relative * low.abs())[finite].all())
    rows, ids = torch.arange(20).repeat_interleave(64), torch.arange(64).repeat(20)
    gate, off = screen.weigh(rows, ids)
    assert bool(((single.reshape(-1) - gate).abs() <= off)[finite.reshape(-1)].all())


@pytest.mark.parametrize("fused", [True, False])
def test_the_product_rounds_as_it_says(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN's own bias, where torch has it, and with a bias added afterwards."""
    if fused and not scoring.fused():
        pytest.skip("this processor or torch has no fused bfloat16 product")
    monkeypatch.setattr(scoring, "fused", lambda: fused)
    x, W, b, _ = make("plain", 100, 64, 512, 0)
    x, W = x.bfloat16(), W.bfloat16()
    for shift in (b, 100 * b, 0 * b):
        product = Product(W, shift)
        tile, size = product(x), (x.double().abs() @ W.double().abs().T)
        true = x.double() @ W.double().T + shift.double()
        off = product.relative * true.abs() + product.wrong_bias(shift.abs().max()) + 2.0**-17 * size
        assert tile.dtype == torch.bfloat16
        assert bool(((tile.double() - true).abs() <= off).all())


def test_kth_largest_is_that_of_topk() -> None:
    """Negative numbers, zeros of both signs, repeats and infinities included."""
    values = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[:50] = values[:50].round()
    values[50:60, :5], values[60:70, 5:12] = torch.inf, -torch.inf
    values[70:80] *= 0
    for k in (1, 7, 40):
        assert torch.equal(kth_largest(values, k), values.float().topk(k).values[:, -1:])


def test_two_least_are_the_ends_of_a_sort() -> None:
    """Equal ones count twice."""
    best = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)).mul_(2).round_()
    best[0] = -torch.inf
    second, first = two_least(best)
    assert torch.equal(torch.cat([first, second], -1), best.sort(-1).values[:, :2])
    assert [part.tolist() for part in two_least(torch.tensor([[3.0, 1.0]]))] == [[[3.0]], [[1.0]]]


@pytest.mark.parametrize("top", [100, 2**16, 2**16 + 1, 2**40])
def test_sorting_is_stable_whatever_the_size(top: int) -> None:
    """Two, four or eight bytes a key."""
    keys = torch.randint(0, 50, (1000,), generator=torch.Generator().manual_seed(0)) * (top // 50)
    keys[:3] = top - 1
    assert torch.equal(sparse.sorting(keys, top), torch.sort(keys, stable=True).indices)


@pytest.mark.parametrize("columns", [64, 63])
def test_hits_are_the_places_above_the_floor(columns: int) -> None:
    """Four to a word or, where that does not divide, one by one."""
    tile = torch.randn(17, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    floor = tile.float().topk(5).values[:, -1:].bfloat16()
    floor[3] = torch.inf
    wanted = (tile >= floor).view(-1).nonzero().squeeze(-1)
    assert torch.equal(hits(tile.clone(), floor), wanted)


def test_below_rounds_down() -> None:
    """To the next bfloat16 number, across zero and at the ends."""
    floor = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.tensor([0.0, 1e-42, -1e-42])])
    low = below(floor).float()
    assert bool((low <= floor).all())
    near = floor.abs() > 1e-30
    assert bool(((floor - low) <= floor.abs() * 2.0**-7)[near].all())
    assert below(torch.tensor([torch.inf, -torch.inf])).tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize(("F", "k", "size"), [(8192, 32, 64), (2048, 32, 16), (2048, 256, 2), (100, 50, 0)])
def test_groups_leave_four_maxima_for_each_of_k(F: int, k: int, size: int) -> None:
    """With fewer the k-th maximum would say little about the k-th score."""
    assert group_size(F, k) == size


def test_scoring_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By size and processor, or by hand; other dtypes and a handful of rows or latents never go low."""
    x, W = torch.zeros(4096, 64), torch.zeros(1024, 64)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert scoring.worthwhile(x, W)
    assert not scoring.worthwhile(x[:100], W)
    assert not scoring.worthwhile(x.double(), W.double())
    with scoring.scoring("bfloat16"):
        assert scoring.worthwhile(x[:16], W)
        assert not scoring.worthwhile(x[:15], W)
        assert not scoring.worthwhile(x[:0], W)
        assert not scoring.worthwhile(x, W[:63])
    with scoring.scoring("exact"):
        assert not scoring.worthwhile(x, W)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert not scoring.worthwhile(x, W)


def test_small_remainders_join_the_last_tile() -> None:
    """One to three rows run through another kernel that sums in another order."""
    assert sparse.tile_lengths(0, 16) == []
    assert sparse.tile_lengths(3, 16) == [3]
    assert sparse.tile_lengths(33, 16) == [16, 17]
    assert sparse.tile_lengths(48, 32) == [32, 16]


def gradients(coder: SparseCoder, x: Tensor, kind: scoring.Scoring) -> dict[str, Tensor]:
    """Output and gradients of all parameters."""
    coder.zero_grad()
    with scoring.scoring(kind):
        out = coder(x)
    out.reconstruction.square().mean().backward()
    found = {name: p.grad for name, p in coder.named_parameters() if p.grad is not None}
    return {"indices": out.codes.indices, "output": out.reconstruction.detach(), **found}


@pytest.mark.parametrize("name", ["topk-after", "topk-before", "topk-none", "topk-magnitude"])
@pytest.mark.parametrize("gate_space", ["raw", "decoder_norm"])
def test_gradients_are_those_of_the_float32_path(name: str, gate_space: str) -> None:
    """Same pairs, same gradients up to rounding."""
    coder = make_coder(name, 32, 256, 6, gate_space=gate_space, pre_bias="tied").float()
    x = torch.randn(80, 32, generator=torch.Generator().manual_seed(5))
    low, full = gradients(coder, x, "bfloat16"), gradients(coder, x, "exact")
    assert low.keys() == full.keys()
    assert torch.equal(low.pop("indices"), full.pop("indices"))
    for key in full:
        size = float(full[key].abs().max())
        torch.testing.assert_close(low[key], full[key], rtol=0, atol=1e-5 * size, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("problem", ["plain", "zeros", "whole"])
def test_nothing_dense_is_made_beyond_a_tile(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where all is well nor where everything ties."""
    monkeypatch.setattr(sparse, "TILE_BYTES", 1)
    given = make(problem, 600, 8, 1024, 0)
    with Largest() as seen:
        select("bfloat16", given, best(2, "signed"))
    assert seen.numel <= 16 * 1024 * 2 < 600 * 1024 // 16
