"""The module: shapes, context, errors, hash; and the coder that changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unmix.coder import reference
from unmix.coder.codes import Codes
from unmix.coder.config import CoderConfig, Normalise, TopK
from unmix.coder.identity import IdentityCoder
from unmix.coder.native import load_native
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError

from .makers import ACTIVATIONS, NORMALISES, make_coder, make_input


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (0,), (2, 0), (2, 1, 3)])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["none", "layer_norm"])
def test_leading_dimensions_come_back(leading: tuple[int, ...], skip: bool, kind: str) -> None:
    """Of codes, pre-activations and output alike; no token at all is fine."""
    coder = make_coder("topk-after", 4, 6, 2, d_out=5, pre_bias="own", skip=skip, normalise={"kind": kind})
    x = torch.randn(*leading, 4, dtype=torch.float64)
    codes, pre = coder.encode(x, return_pre=True)
    codes.check()
    assert codes.leading == leading
    assert codes.dense().shape == pre.shape == (*leading, 6)
    assert coder.decode(codes).shape == coder(x).reconstruction.shape == (*leading, 5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_token_at_all(name: str) -> None:
    """Forward and backward, for every activation."""
    coder = make_coder(name, 4, 6, 2)
    out = coder(torch.zeros(0, 4, dtype=torch.float64))
    out.codes.check()
    out.reconstruction.sum().backward()
    assert coder.W_enc.grad is not None
    assert not coder.W_enc.grad.any()


def test_pre_activations_are_the_affine_map() -> None:
    """Before gate and relu: W (x − b) + b_enc of the scaled input."""
    coder = make_coder("topk-after", 4, 6, 2, pre_bias="own", input_scale=0.5)
    x = make_input(3, 4, "normal")
    _, pre = coder.encode(x, return_pre=True)
    torch.testing.assert_close(pre, (0.5 * x - coder.b_pre) @ coder.W_enc.T + coder.b_enc)


@pytest.mark.parametrize("normalise", NORMALISES)
def test_the_output_by_hand(normalise: dict[str, object]) -> None:
    """normalise → scale → encode → decode → skip → scale → de-normalise, one token, in plain torch."""
    coder = make_coder("relu", 4, 6, normalise=normalise, pre_bias="tied", skip=True, input_scale=0.5, output_scale=3.0)
    rule = coder.config.normalise
    x = make_input(1, 4, "normal")
    mean, std = x.mean(), x.std(correction=rule.ddof)
    if rule.kind == "standardise":
        mean, std, rule = coder.norm_mean, 1 / coder.norm_scale, Normalise(kind="layer_norm", eps=0)
    elif rule.kind == "constant_norm":
        mean, std, rule = 0, x.norm() / 4**0.5, Normalise(kind="layer_norm", eps=0)
    s = 0.5 * ((x - mean) / (std + rule.eps) if rule.kind == "layer_norm" else x)
    f = ((s - coder.b_dec) @ coder.W_enc.T + coder.b_enc).relu()
    y = 3.0 * (f @ coder.W_dec + coder.b_dec + s @ coder.W_skip.T)
    if rule.kind == "layer_norm" and rule.restore:
        y = y * (std + rule.eps if rule.eps_back else std) + mean
    torch.testing.assert_close(coder(x).reconstruction, y)


def test_gate_factors_by_hand() -> None:
    """The decoder row (3, 4 | 12): its norm is 13, the norms of its parts add up to 17."""
    for space, expected in (("raw", None), ("decoder_norm", 13.0), ("decoder_norm_sum", 17.0), ("own", 2.5)):
        coder = make_coder("relu", 3, 1, gate_space=space, reads=("a", "b"), write_widths=(2, 1))
        with torch.no_grad():
            coder.W_dec.copy_(torch.tensor([[3.0, 4, 12]]))
            if space == "own":
                coder.gate_scale.fill_(2.5)
        factor = coder.gate_factor()
        assert (factor if factor is None else factor.tolist()) == (expected if expected is None else [expected])


def test_a_token_of_zeros_has_no_direction() -> None:
    """constant_norm leaves it zero, with finite gradients elsewhere."""
    coder = make_coder("relu", 4, 6, normalise={"kind": "constant_norm"})
    out = coder(torch.zeros(2, 4, dtype=torch.float64))
    assert torch.isfinite(out.codes.values).all()
    assert not out.reconstruction.any()


def test_from_state_copies_nothing_but_a_strided_decoder() -> None:
    """The encoder may stay a transposed view of a file; wrong names or shapes are told."""
    config = CoderConfig(d_in=3, n_latents=5, activation=TopK(k=2))
    state = {
        "W_enc": torch.randn(3, 5).T,
        "b_enc": torch.randn(5),
        "W_dec": torch.randn(3, 5).T,
        "b_dec": torch.zeros(3),
    }
    coder = SparseCoder.from_state(config, state, {"rate": torch.ones(5)})
    assert coder.W_enc.data_ptr() == state["W_enc"].data_ptr()
    assert coder.W_dec.is_contiguous()
    assert not coder.training
    assert coder.statistics["rate"].tolist() == [1] * 5
    x = torch.randn(4, 3)
    dense = reference.forward_dense(coder, x)
    torch.testing.assert_close(coder(x).reconstruction, dense)
    with pytest.raises(ConfigError, match=r"input: tensors \{'W_enc': \(5, 3\)\} do not fit the config, expected"):
        SparseCoder.from_state(config, {"W_enc": state["W_enc"]})


def test_decoding_needs_the_context_that_encoding_made() -> None:
    """A missing mean or skip input is an error, never a guess."""
    x = make_input(3, 4, "normal")
    normed = make_coder("topk-after", 4, 6, 2, normalise={"kind": "layer_norm"})
    bare = Codes.from_dense(normed.encode(x).dense().detach())
    with pytest.raises(ValueError, match="decoding needs the mean and std of each token"):
        normed.decode(bare)
    skipping = make_coder("topk-after", 4, 6, 2, skip=True)
    with pytest.raises(ValueError, match="decoding adds a skip of the input, and these codes carry no context"):
        skipping.decode(bare)
    codes = normed.encode(x)
    raw = normed.decode_raw(codes.indices, codes.values, codes.offsets, codes.context["mean"], codes.context["std"])
    assert torch.equal(raw, normed.decode(codes))
    chosen = codes.select(torch.tensor([2, 0]))
    torch.testing.assert_close(normed.decode(chosen), normed.decode(codes)[[2, 0]])


def test_wrong_widths_are_refused() -> None:
    """With the coder's name and both numbers."""
    coder = make_coder("topk-after", 4, 6, 2)
    with pytest.raises(ValueError, match=r"^input: input is 3 wide, this coder reads d_in = 4$"):
        coder.encode(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^input: codes over 5 latents, this coder has 6$"):
        coder.decode(Codes.from_dense(torch.ones(2, 5, dtype=torch.float64)))
    with pytest.raises(ConfigError, match=r"^input writes 1 hooks of 4 in all, found widths \[2, 2\]$"):
        coder.split_writes(torch.zeros(1, 4), [2, 2])


def test_outputs_are_split_over_the_hooks_written() -> None:
    """A crosscoder's output, cut in the order of `writes`."""
    config = CoderConfig(
        reads=("a",), writes=("b", "c"), d_in=4, d_out=5, n_latents=6, activation=TopK(k=2), pre_bias="none"
    )
    parts = SparseCoder(config).split_writes(torch.arange(5.0), [2, 3])
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3, 4]]


def test_the_dictionary_has_unit_rows() -> None:
    """Whatever the decoder's norms; a row of zeros stays zero."""
    coder = make_coder("topk-after", 4, 6, 2)
    with torch.no_grad():
        coder.W_dec[3] = 0
    norms = coder.dictionary.norm(dim=-1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 1, 1, 0, 1, 1], dtype=torch.float64))


def test_fresh_weights() -> None:
    """Unit decoder rows, the encoder their copy, the same for the same seed and name."""
    config = CoderConfig(d_in=4, n_latents=6, activation=TopK(k=2))
    coder = SparseCoder(config)
    torch.testing.assert_close(coder.W_dec.norm(dim=-1), torch.ones(6))
    assert torch.equal(coder.W_enc, coder.W_dec)
    assert coder.W_enc.data_ptr() != coder.W_dec.data_ptr()
    assert torch.equal(SparseCoder(config).W_dec, coder.W_dec)
    assert not torch.equal(SparseCoder(config, seed=1).W_dec, coder.W_dec)
    assert not torch.equal(SparseCoder(config.model_copy(update={"name": "other"})).W_dec, coder.W_dec)
    assert "TopK" in repr(coder)
    assert "n_latents=6" in repr(coder)


def test_the_hash_changes_with_every_weight_and_field() -> None:
    """And with nothing else."""
    base = make_coder("jumprelu", 4, 6, pre_bias="own", skip=True)
    found = {base.hash()}
    assert make_coder("jumprelu", 4, 6, pre_bias="own", skip=True).hash() in found
    assert base.eval().hash() in found
    for name, _ in base.named_parameters():
        other = make_coder("jumprelu", 4, 6, pre_bias="own", skip=True)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[0] += 1e-9
        found.add(other.hash())
    found.add(make_coder("jumprelu", 4, 6, pre_bias="own", skip=True, input_scale=2.0).hash())
    found.add(base.float().hash())
    with torch.no_grad():
        zeros = [make_coder("relu", 2, 3).to(dtype) for dtype in (torch.float16, torch.bfloat16)]
        for coder in zeros:
            for parameter in coder.parameters():
                parameter.zero_()
    assert zeros[0].hash() != zeros[1].hash()
    assert len(found) == 3 + len(list(base.parameters()))


def test_the_identity_coder_reconstructs_exactly() -> None:
    """Latent i is coordinate i; signs stay."""
    coder = IdentityCoder("layers.1", 5)
    x = torch.randn(2, 3, 5)
    out = coder(x)
    assert torch.equal(out.codes.dense(), x)
    assert torch.equal(out.reconstruction, x)
    assert out.codes.uniform_k == 5
    assert coder.config.reads == ("layers.1",)


def test_an_orthogonal_basis_reconstructs_too() -> None:
    """Codes are the coordinates in that basis."""
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    coder = IdentityCoder("layers.1", 5, basis).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    out = coder(x)
    torch.testing.assert_close(out.codes.dense(), x @ basis.T)
    torch.testing.assert_close(out.reconstruction, x)


def test_a_basis_that_is_none() -> None:
    """Neither a skewed one nor a part of one gives exact reconstructions."""
    with pytest.raises(ValueError, match="basis rows are not orthonormal"):
        IdentityCoder("layers.1", 2, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def test_a_coder_converts_itself(tmp_path: Path) -> None:
    """`coder.convert` is `unmix.convert` on a coder in memory."""
    coder = SparseCoder(CoderConfig(reads=("blocks.1.resid_post",), d_in=4, n_latents=6, activation=TopK(k=2))).eval()
    coder.convert(tmp_path / "native", "native")
    assert load_native(tmp_path / "native").hash() == coder.hash()
