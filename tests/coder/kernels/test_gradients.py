"""Decode, and the one backward pass: values and every gradient against float64 autograd on dense codes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from unmix.coder.kernels import plain
from unmix.coder.kernels.adam import Adam, Dictionary, Row, plain_step, projected
from unmix.coder.kernels.decode import decode, residual
from unmix.coder.kernels.gradients import Ending, Gradients, latent_gradients, take_step
from unmix.coder.kernels.pairs import by_latent


@dataclass
class Case:
    """Ragged codes in which latent 1 fires on every token and latent 0 on none, and all that the pass reads."""

    indices: Tensor
    offsets: Tensor
    values: Tensor
    x: Tensor
    grad_y: Tensor
    extra: Tensor
    W_dec: Tensor
    W_enc: Tensor

    @property
    def n(self) -> int:
        """Latents."""
        return len(self.W_dec)


def make(device: str, t: int = 9, F: int = 7, d_in: int = 10, d_out: int = 19) -> Case:
    """Values of both signs, among them zeros."""
    fires = torch.rand(t, F) < 0.4
    fires[:, 0], fires[:, 1], fires[4] = False, True, False
    ids = fires.nonzero()[:, 1]
    values = torch.randn(len(ids))
    values[::5] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), fires.sum(1).cumsum(0)])
    made = Case(
        ids.int(), offsets, values, torch.randn(t, d_in), torch.randn(t, d_out), torch.randn(len(ids)),
        torch.nn.functional.normalize(torch.randn(F, d_out), dim=-1), torch.randn(F, d_in),
    )  # fmt: skip
    return Case(**{name: tensor.to(device) for name, tensor in vars(made).items()})


def dense(case: Case, relu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dz of the pairs, dL/dW_dec, dL/dW_enc, dL/db_enc by autograd in float64, through dense codes."""
    rows = torch.arange(len(case.offsets) - 1, device=case.x.device).repeat_interleave(case.offsets.diff())
    places = (rows, case.indices.long())
    # A bias that makes each pre-activation the value it has, and leaves all its gradients.
    W_dec, W_enc = (w.double().requires_grad_() for w in (case.W_dec, case.W_enc))
    b = torch.zeros(case.n, dtype=torch.float64, device=case.x.device, requires_grad=True)
    free = case.x.double() @ W_enc.T + b
    z = free + (case.values.double() - free.detach()[places]).new_zeros(1)
    shift = torch.zeros_like(z).index_put(places, case.values.double() - free.detach()[places])
    z = z + shift
    z.retain_grad()
    mask = torch.zeros_like(z).index_put(places, torch.ones_like(case.values, dtype=torch.float64))
    codes = (z.relu() if relu else z) * mask
    loss = (codes @ W_dec * case.grad_y).sum() + (codes[places] * case.extra).sum()
    loss.backward()
    assert z.grad is not None and W_dec.grad is not None and W_enc.grad is not None and b.grad is not None
    return z.grad[places], W_dec.grad, W_enc.grad, b.grad


def assert_near(found: Tensor | None, wanted: Tensor) -> None:
    """To float32's rounding."""
    assert found is not None
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)


def fired(case: Case, relu: bool) -> Tensor:
    """The codes' values."""
    return case.values.relu() if relu else case.values


@pytest.mark.parametrize(("relu", "piece"), [(True, 128), (False, 3)])
def test_every_gradient(device: str, relu: bool, piece: int) -> None:
    """Whole latents and latents cut into pieces of three, a latent without pairs, a token without codes."""
    case = make(device)
    wanted = dense(case, relu)
    values = fired(case, relu)
    args = (case.indices, case.offsets, values, case.grad_y, case.W_dec, case.x, case.extra, case.n, relu)
    found = latent_gradients(*args, piece=piece)
    for mine, twin, exact in zip(
        (found.z, found.dec, found.enc, found.bias), plain.latent_gradients(*args), wanted, strict=True
    ):
        assert_near(mine, exact)
        assert_near(twin, exact)
    again = latent_gradients(*args, piece=piece)
    assert all(torch.equal(a, b) for a, b in zip(_all(found), _all(again), strict=True))


def _all(grads: Gradients) -> list[Tensor]:
    return [t for t in (grads.z, grads.dec, grads.enc, grads.bias) if t is not None]


def test_halves_of_the_pass(device: str) -> None:
    """Only the decoder's, as behind a decode alone; only the encoder's, of gradients by the values."""
    case = make(device)
    z, dec, _, _ = plain.latent_gradients(
        case.indices, case.offsets, case.values, case.grad_y, case.W_dec, None, None, case.n, False
    )
    found = latent_gradients(
        case.indices, case.offsets, case.values, case.grad_y, case.W_dec, None, None, case.n, False
    )
    assert_near(found.z, z)
    assert_near(found.dec, dec if dec is not None else z)
    assert found.enc is None
    found = latent_gradients(case.indices, case.offsets, case.values, None, None, case.x, case.extra, case.n, False)
    wanted = plain.latent_gradients(
        case.indices, case.offsets, case.values, None, None, case.x, case.extra, case.n, False
    )
    assert_near(found.z, case.extra)
    assert_near(found.enc, wanted[2] if wanted[2] is not None else z)
    assert_near(found.bias, wanted[3])
    assert found.dec is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(device: str, dtype: torch.dtype) -> None:
    """Sums of rows with a bias; a row without codes; width that fills no block; what is left of a target."""
    case = make(device, d_out=37)
    table, bias = case.W_dec.to(dtype), torch.randn(37, device=device)
    full = torch.zeros(9, case.n, dtype=torch.float64, device=device)
    rows = torch.arange(9, device=device).repeat_interleave(case.offsets.diff())
    full[rows, case.indices.long()] = case.values.double()
    wanted = full @ table.double() + bias.double()
    assert_near(decode(case.values, table, case.indices, case.offsets, bias), wanted)
    assert_near(plain.decode(case.values, table, case.indices, case.offsets, bias), wanted)
    error, squares = residual(case.values, table, case.indices, case.offsets, bias, case.grad_y)
    assert_near(error, wanted - case.grad_y)
    assert_near(squares, (wanted - case.grad_y).square().sum(1))


def test_pairs_are_cut_into_pieces_that_hold_each_once(device: str) -> None:
    """All pairs of a latent in order of tokens, no piece too long, slots numbered without gaps, cut latents listed."""
    case = make(device)
    pairs = by_latent(case.indices, case.offsets, case.n, 4)
    seen: list[int] = []
    slots: list[int] = []
    for latent, first, end, slot in pairs.pieces.tolist():
        if latent == case.n:
            continue
        assert end - first <= 4
        seen += range(first, end)
        slots += [slot] * (slot >= 0)
        assert (case.indices[pairs.order[first:end].long()] == latent).all()
    assert seen == list(range(len(case.indices)))
    assert slots == list(range(len(slots))) and len(slots) <= pairs.slots
    assert pairs.split.tolist()[0] == [1, 0, 2]
    rows = torch.arange(9, device=device).repeat_interleave(case.offsets.diff())
    assert torch.equal(rows[pairs.order.long()], pairs.tokens.long())


@pytest.mark.parametrize("at_once", [True, False])
def test_the_optimisers_step(device: str, at_once: bool) -> None:
    """Projection, clipping, torch's Adam, unit rows and the copy: in the pass itself, or in a second one."""
    # Copies in float16: the interpreter cuts bfloat16 off where a card rounds it.
    case = make(device)
    values = fired(case, True)
    b_enc = torch.randn(case.n, device=device)
    params = Dictionary(
        Row.fresh(case.W_dec.clone(), torch.float16), Row.fresh(case.W_enc.clone(), torch.float16, spare=True),
        Row.fresh(b_enc.clone()),
    )  # fmt: skip
    theirs = [torch.nn.Parameter(w.clone()) for w in (case.W_dec, case.W_enc, b_enc)]
    optimiser = torch.optim.Adam(theirs, lr=0.01, betas=(0.8, 0.95))
    twin = [Row.fresh(w.clone()) for w in (case.W_dec, case.W_enc, b_enc)]
    clip = torch.tensor(0.5, device=device)
    args = (case.indices, case.offsets, values, case.grad_y, case.W_dec, case.x, case.extra, case.n, True)
    _, dec, enc, bias = plain.latent_gradients(*args)
    assert dec is not None and enc is not None
    for step in (1, 2):
        adam = Adam(0.01, step, (0.8, 0.95))
        ending = Ending(True, not at_once, params, adam if at_once else None, clip, True)
        grads = latent_gradients(*args, ending=ending, piece=4)
        wanted = [projected(dec, theirs[0].detach()), enc, bias]
        if not at_once:
            assert grads.squares is not None
            assert_near(
                grads.squares, sum((g.view(case.n, -1).square().sum(1) for g in wanted), torch.zeros_like(bias))
            )
            take_step(grads, Ending(params=params, adam=adam, clip=clip, unit=True))
        params.swap()
        for p, row, g in zip(theirs, twin, wanted, strict=True):
            p.grad = g * clip
            plain_step(row, g, adam, clip, unit=p is theirs[0])
        optimiser.step()
        with torch.no_grad():
            theirs[0].div_(theirs[0].norm(dim=-1, keepdim=True))
    for row, p, plainly in zip((params.dec, params.enc, params.bias), theirs, twin, strict=True):
        assert_near(row.weight, p.detach())
        assert_near(plainly.weight, p.detach())
        assert_near(row.first, optimiser.state[p]["exp_avg"])
        assert_near(row.second, optimiser.state[p]["exp_avg_sq"])
    for row in (params.dec, params.enc):
        assert row.low is not None and torch.equal(row.low, row.weight.half())


def test_a_step_that_may_not_go_moves_nothing(device: str) -> None:
    """One bool on the device holds weights and moments where they are."""
    case = make(device)
    params = Dictionary(*(Row.fresh(w.clone()) for w in (case.W_dec, case.W_enc, torch.zeros(case.n, device=device))))
    ending = Ending(params=params, adam=Adam(0.1, 1), go=torch.tensor(False, device=device))
    latent_gradients(
        case.indices, case.offsets, case.values, case.grad_y, case.W_dec, case.x, None, case.n, False, ending=ending
    )
    assert torch.equal(params.dec.weight, case.W_dec) and torch.equal(params.enc.weight, case.W_enc)
    assert not params.dec.second.any() and not params.bias.weight.any()


def test_what_an_ending_needs(device: str) -> None:
    """Said before anything is launched."""
    case = make(device)
    args = (case.indices, case.offsets, case.values, case.grad_y, case.W_dec)
    with pytest.raises(ValueError, match="need the parameters"):
        latent_gradients(*args, None, None, case.n, False, ending=Ending(project=True))
    params = Dictionary(*(Row.fresh(w) for w in (case.W_dec, case.W_enc, torch.zeros(case.n, device=device))))
    with pytest.raises(ValueError, match="decoder and encoder"):
        latent_gradients(*args, None, None, case.n, False, ending=Ending(params=params, adam=Adam(0.1, 1)))
