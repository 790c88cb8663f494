"""The splice against the model's own forward, patched by hand; identity, errors kept, masks, gradients, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from unmix.coder.identity import IdentityCoder
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy, ModelFingerprint
from unmix.lm import Add, LanguageModel, Set
from unmix.lm.points import LAYER_POINTS
from unmix.lm.splice import error_mode

from .fakes import EVERYWHERE, LinearCoder, PerfectCoder, topk_coder
from .families import CONFIGS, NO_MID, raw_model, some_tokens, tiny

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@contextmanager
def patched(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module whose output is changed by a plain torch hook: the hand-written splice."""

    def hook(_m: Any, _a: Any, out: Any) -> Any:
        return change(out) if isinstance(out, Tensor) else (change(out[0]), *out[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", list(CONFIGS))
def test_writing_back_what_was_read_changes_nothing_at_any_point(family: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    before = lm.logits(tokens)
    for name in [n for n in lm.hooks() if n.startswith("blocks.1.") or n in ("embeddings", "final_norm")]:
        # `clone`, so that the value really takes the way of a replacement.
        after = lm.spliced_logits(tokens, {name: torch.clone})
        torch.testing.assert_close(after, before, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", list(CONFIGS))
def test_what_is_written_is_what_flows_on(family: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    for point in LAYER_POINTS:
        name = f"blocks.1.{point}"
        if name not in lm.hooks():
            continue
        value = torch.randn(2, 9, lm.width(name), generator=torch.Generator().manual_seed(1))
        out = lm.run(tokens, {name: lambda _, v=value: v}, capture=[name], logits=False)
        torch.testing.assert_close(out.activations[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", [f for f in CONFIGS if f not in NO_MID])
def test_writing_resid_mid_moves_the_stream_itself(family: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    value = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))
    wanted = ["blocks.1.resid_post", "blocks.1.mlp_out_post", "blocks.1.mlp_in"]
    acts = lm.run(tokens, {"blocks.1.resid_mid": lambda _: value}, capture=wanted, logits=False).activations
    torch.testing.assert_close(acts[wanted[0]], value + acts[wanted[1]], **CLOSE)
    bare = lm.capture(tokens, wanted[2])
    assert not torch.allclose(acts[wanted[2]], bare[wanted[2]], atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "opt"])
@pytest.mark.parametrize("point", ["resid_post", "mlp_out", "attn_out"])
def test_spliced_coder_equals_a_hand_written_hook(family: str, point: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    coder = LinearCoder(f"blocks.1.{point}", 16)
    module = lm.model.get_submodule(lm.hook(f"blocks.1.{point}").write.path)
    with torch.no_grad(), patched(module, coder.map):
        expected = lm.model(input_ids=tokens).logits
    with lm.bind(coder) as bound, torch.no_grad():
        out = bound(tokens)
    assert out.logits is not None
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    assert not torch.allclose(expected, lm.logits(tokens), atol=1e-2)
    assert coder.decode(out.codes[coder.config.name]).shape == (2, 9, 16)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_perfect_reconstruction_and_kept_error_leave_logits_alone(family: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    before = lm.logits(tokens)
    with torch.no_grad():
        with lm.bind(PerfectCoder("layers.1", 16)) as bound:
            torch.testing.assert_close(bound(tokens).logits, before, atol=1e-5, rtol=1e-5)
        with lm.bind(topk_coder("layers.1", 16), error="keep") as bound:
            torch.testing.assert_close(bound(tokens).logits, before, atol=1e-5, rtol=1e-5)
        with lm.bind(topk_coder("layers.1", 16)) as bound:
            assert not torch.allclose(bound(tokens).logits, before, atol=1e-2)
            torch.testing.assert_close(bound.raw(tokens), before)


@pytest.mark.parametrize(
    ("family", "hook"),
    [
        ("gpt2", "blocks.1.resid_pre~centred"), ("gpt2", "blocks.1.resid_mid"), ("gpt2", "blocks.1.mlp_in~normalised"),
        ("gpt2", "blocks.1.z~unbiased"), ("granite", "blocks.1.mlp_out_post"),
    ],
)  # fmt: skip
def test_a_kept_error_is_exact_where_what_is_shown_is_not_what_is_written(family: str, hook: str) -> None:
    """With gradients, and beside a position that an intervention moves."""
    lm, tokens = tiny(family), some_tokens(1, 6)
    with lm.bind(topk_coder(hook, 16), error="keep") as bound:
        out = bound(tokens)
        assert torch.equal(out.logits, bound.raw(tokens))
        assert out.logits.requires_grad
        values = out.codes[bound.bindings[0].name].values
        assert torch.autograd.grad(out.logits.logsumexp(-1).sum(), values)[0].abs().max() > 0
        moved = bound(tokens, interventions=[Add(latent=2, value=4.0, where=[4])]).logits
    assert torch.equal(moved[:, :4], out.logits[:, :4]) and not torch.equal(moved[:, 4], out.logits[:, 4])


def test_a_transcoder_reads_one_hook_and_writes_another() -> None:
    lm, tokens = tiny("gemma2"), some_tokens()
    coder = LinearCoder("blocks.1.mlp_in", 16, "blocks.1.mlp_out_post")
    seen = lm.capture(tokens, "blocks.1.mlp_in")["blocks.1.mlp_in"]
    expected = lm.spliced_logits(tokens, {"blocks.1.mlp_out_post": lambda _: coder.map(seen)})
    with lm.bind(coder) as bound:
        torch.testing.assert_close(bound(tokens).logits, expected, **CLOSE)
    with lm.bind(coder, error="keep") as bound:
        torch.testing.assert_close(bound(tokens).logits, lm.logits(tokens), atol=1e-5, rtol=1e-5)


def test_a_coder_over_several_reads_and_writes() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    reads = ("blocks.0.resid_post", "blocks.1.mlp_in")
    coder = LinearCoder(reads, 32, ("blocks.1.mlp_out_post", "blocks.2.z"), d_out=32)
    with lm.bind({"cross": coder}) as bound:
        out = bound(tokens, capture=["blocks.1.mlp_out_post", "blocks.2.z"])
    x = torch.cat([lm.capture(tokens, r)[r] for r in reads], dim=-1)
    torch.testing.assert_close(out.activations["blocks.1.mlp_out_post"], coder.map(x)[..., :16], **CLOSE)
    torch.testing.assert_close(out.activations["blocks.2.z"], coder.map(x)[..., 16:], **CLOSE)
    assert out.codes["cross"].leading == (2, 9)


def test_a_coder_that_writes_before_it_has_read_is_refused_before_any_pass() -> None:
    lm = tiny("llama")
    both = ("blocks.0.resid_post", "blocks.1.resid_post")
    with pytest.raises(ModelError) as caught, lm.bind({"cross": LinearCoder(both, 32)}):
        pass
    assert str(caught.value) == (
        "coder 'cross' writes blocks.0.resid_post before the model has reached blocks.1.resid_post, which it reads; "
        "one forward pass cannot splice it"
    )
    seen = LinearCoder("blocks.1.resid_post~centred", 16, "blocks.0.resid_post~centred", name="seen")
    with pytest.raises(ModelError, match=r"'seen' writes blocks\.0\.resid_post~centred before"), lm.bind(seen):
        pass
    paths = ("model.layers.0.mlp.act_fn@out", "model.layers.1.mlp.act_fn@out")  # their order is not known beforehand
    with lm.bind(LinearCoder(paths, 64)) as bound, pytest.raises(ModelError, match="one forward pass cannot splice"):
        bound(some_tokens())


def test_several_coders_each_read_what_the_ones_before_left() -> None:
    lm, tokens = tiny("qwen3"), some_tokens()
    first, second = LinearCoder("layers.0", 16, name="a"), LinearCoder("blocks.2.resid_pre", 16, name="b", seed=3)
    with lm.bind([first, second]) as bound:
        out = bound(tokens)
    expected = lm.spliced_logits(tokens, {"layers.0": first.map, "blocks.2.resid_pre": second.map})
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    assert list(out.codes) == ["a", "b"]


def test_one_head() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    whole = lm.capture(tokens, "blocks.1.z")["blocks.1.z"].clone()
    whole[..., 4:8] = 0
    expected = lm.spliced_logits(tokens, {"blocks.1.z": lambda _: whole})
    torch.testing.assert_close(lm.spliced_logits(tokens, {"blocks.1.z#1": torch.zeros_like}), expected)


def test_masked_positions_pass_untouched() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    tokens[0, 4] = 77
    policy = InputPolicy(bos="none", skip_first=2, skip_ids=(77,))
    for hook in ("blocks.1.resid_post", "blocks.1.resid_mid", "blocks.1.mlp_out_post"):
        coder = LinearCoder(hook, 16, policy=policy)
        with lm.bind(coder) as bound, torch.no_grad():
            found = bound(tokens, capture=[hook], logits=False).activations[hook]
        bare = lm.capture(tokens, hook)[hook]
        masked = torch.zeros(2, 9, dtype=torch.bool)
        masked[:, :2] = masked[0, 4] = True
        masked |= tokens == 77
        assert torch.equal(found[masked], bare[masked])
        torch.testing.assert_close(found[~masked], coder.map(bare)[~masked].detach(), **CLOSE)


def test_documents_are_kept_apart_where_the_policy_says_so() -> None:
    lm, tokens = tiny("llama"), some_tokens(1, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    apart = LinearCoder("layers.1", 16, policy=InputPolicy(bos="none", skip_first=0, attend_across=False))
    with lm.bind(apart) as bound, torch.no_grad():
        together = bound(tokens, documents).logits
        alone = bound(tokens[:, 3:]).logits
        assert together is not None
        torch.testing.assert_close(together[:, 3:], alone, **CLOSE)
        torch.testing.assert_close(bound.raw(tokens, documents), lm.logits(tokens, documents))
    with lm.bind(LinearCoder("layers.1", 16)) as bound, torch.no_grad():
        assert torch.equal(bound(tokens, documents).logits, bound(tokens).logits)


def test_gradients_equal_those_of_a_hand_written_splice() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    first, second = LinearCoder("layers.0", 16, name="a"), LinearCoder("layers.1", 16, name="b", seed=3)
    parameters = [first.W, first.V, second.W, second.V]
    with lm.bind([first, second]) as bound:
        out = bound(tokens)
    assert out.logits is not None
    values = [out.codes[n].values for n in ("a", "b")]
    found = torch.autograd.grad(out.logits.logsumexp(-1).sum(), [*parameters, *values])

    blocks = lm.model.model.layers
    with patched(blocks[0], first.map), patched(blocks[1], second.map):
        expected = torch.autograd.grad(lm.model(input_ids=tokens).logits.logsumexp(-1).sum(), parameters)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert all(float(g.norm()) > 0 for g in found)


def test_an_earlier_coder_is_reached_through_the_latents_of_a_later_one_alone() -> None:
    """Not through the error that the later one keeps."""
    lm, tokens = tiny("llama"), some_tokens()
    first, second = LinearCoder("layers.0", 16, name="a"), LinearCoder("layers.1", 16, name="b", seed=3)
    with lm.bind([first, second], error="keep") as bound:
        found = torch.autograd.grad(bound(tokens).logits.logsumexp(-1).sum(), [first.V, second.V])

    def kept(coder: LinearCoder) -> Callable[[Tensor], Tensor]:
        return lambda x: coder.map(x) + (x - coder.map(x)).detach()

    out = lm.run(tokens, {"layers.0": kept(first), "layers.1": kept(second)}).logits
    expected = torch.autograd.grad(out.logsumexp(-1).sum(), [first.V, second.V])
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_finite_differences_of_a_kept_error_move_along_the_latents_alone() -> None:
    """d logits / d decoder row with the error detached: only the reconstruction moves."""
    lm = LanguageModel(raw_model("gpt2").double().requires_grad_(False), "double")  # Llama's norms round to float32
    tokens = some_tokens(1, 6)
    coder = LinearCoder("layers.1", 16).double()
    with lm.bind(coder, error="keep") as bound:
        loss = bound(tokens).logits.logsumexp(-1).sum()
        (gradient,) = torch.autograd.grad(loss, [coder.V])
        x = lm.capture(tokens, "layers.1")["layers.1"]
        error = (x - coder.map(x)).detach()
        direction = torch.randn(coder.V.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

        def moved(step: float) -> Tensor:
            y = x @ coder.W @ (coder.V + step * direction) + error
            return lm.unembed(lm.run(tokens, {"layers.1": lambda _: y}, capture=["layers.2"]).activations["layers.2"])

        slope = (moved(1e-5).logsumexp(-1).sum() - moved(-1e-5).logsumexp(-1).sum()) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_bfloat16_model_with_float32_coder() -> None:
    lm = LanguageModel(raw_model("llama").to(torch.bfloat16).requires_grad_(False), "bf16")
    tokens = some_tokens()
    with torch.no_grad():
        with lm.bind(topk_coder("layers.1", 16)) as bound:
            out = bound(tokens)
            assert out.logits is not None and out.logits.dtype == torch.bfloat16
            assert out.codes["layers.1"].values.dtype == torch.float32
        with lm.bind(IdentityCoder("layers.1", 16)) as bound:
            assert torch.equal(bound(tokens).logits[:, 1:], lm.logits(tokens)[:, 1:])
        with lm.bind(topk_coder("layers.1", 16), error="keep") as bound:
            torch.testing.assert_close(bound(tokens).logits, lm.logits(tokens), atol=2e-2, rtol=2e-2)


def test_a_bfloat16_coder_in_a_float32_model_keeps_errors_exactly() -> None:
    """x − x̂ in the coder's dtype would round the model's own activations."""
    lm, tokens, hook = tiny("llama"), some_tokens(), "blocks.1.resid_post"
    coder = topk_coder(hook, 16).to(torch.bfloat16)
    with lm.bind(coder, error="keep") as bound:
        with torch.no_grad():
            assert torch.equal(bound(tokens).logits, lm.logits(tokens))
        out = bound(tokens)  # with gradients the reconstruction is really there, and takes itself away again
        assert torch.equal(out.logits, lm.logits(tokens))
        assert float(torch.autograd.grad(out.logits.sum(), out.codes[hook].values)[0].norm()) > 0
    with lm.bind(coder) as bound, torch.no_grad():
        spliced = bound(tokens, capture=[hook]).activations[hook]
        assert spliced.dtype == torch.float32
        bare = lm.capture(tokens, hook)[hook]
        torch.testing.assert_close(spliced, coder.decode(coder.encode(bare)).float())


def test_a_skip_transcoder_gives_its_linear_map_of_the_input_too() -> None:
    lm, tokens = tiny("gpt2"), some_tokens()
    config = topk_coder("blocks.1.mlp_in", 16).config.model_copy(
        update={"writes": ("blocks.1.mlp_out",), "skip": True, "pre_bias": "none"}
    )
    coder = SparseCoder(config, seed=1)
    with torch.no_grad():
        coder.W_skip.copy_(torch.randn(16, 16, generator=torch.Generator().manual_seed(4)))
    seen = lm.capture(tokens, "blocks.1.mlp_in")["blocks.1.mlp_in"]
    expected = coder.decode(coder.encode(seen))
    assert not torch.allclose(expected, seen @ coder.W_skip.T, atol=1e-2)
    with lm.bind(coder) as bound, torch.no_grad():
        found = bound(tokens, capture=["blocks.1.mlp_out"]).activations["blocks.1.mlp_out"]
        torch.testing.assert_close(found, expected.detach(), **CLOSE)


def test_residual_mlp_and_attention_coders_in_one_pass() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    coders = {
        "attention": LinearCoder("blocks.0.z", 16), "mlp": LinearCoder("blocks.0.mlp_out", 16, seed=2),
        "transcoder": LinearCoder("blocks.1.mlp_in", 16, "blocks.1.mlp_out", seed=3),
        "stream": LinearCoder("blocks.1.resid_post", 16, seed=4),
    }  # fmt: skip
    with lm.bind(coders) as bound, torch.no_grad():
        found = bound(tokens).logits
    inputs: list[Tensor] = []

    def remember(x: Tensor) -> Tensor:
        inputs.append(x)
        return x

    edits = {
        "blocks.0.z": coders["attention"].map, "blocks.0.mlp_out": coders["mlp"].map, "blocks.1.mlp_in": remember,
        "blocks.1.mlp_out": lambda _: coders["transcoder"].map(inputs[-1]), "layers.1": coders["stream"].map,
    }  # fmt: skip
    torch.testing.assert_close(found, lm.spliced_logits(tokens, edits), **CLOSE)


def test_only_the_places_asked_for_are_spliced() -> None:
    lm, tokens, hook = tiny("llama"), some_tokens(), "blocks.1.resid_post"
    coder = LinearCoder(hook, 16, policy=InputPolicy(bos="none", skip_first=1))
    bare = lm.capture(tokens, hook)[hook]
    for where, prompt, places in [
        ("prompt", 4, [1, 2, 3]),
        ("generated", 4, [4, 5, 6, 7, 8]),
        ([0, 2, 5], None, [2, 5]),
    ]:
        with lm.bind(coder, where=where) as bound, torch.no_grad():
            found = bound(tokens, capture=[hook], prompt=prompt).activations[hook]
        chosen = torch.zeros(9, dtype=torch.bool)
        chosen[places] = True
        assert torch.equal(found[:, ~chosen], bare[:, ~chosen])
        torch.testing.assert_close(found[:, chosen], coder.map(bare)[:, chosen].detach(), **CLOSE)


def test_a_policy_of_the_binding_takes_the_place_of_the_coders() -> None:
    """Peers splice every position, whatever a coder was trained on; and coders that disagree can be bound."""
    lm, tokens = tiny("llama"), some_tokens()
    one = LinearCoder("layers.0", 16, name="a", policy=InputPolicy(bos="none", skip_first=2))
    two = LinearCoder("layers.1", 16, name="b", policy=InputPolicy(bos="context"), seed=3)
    everywhere = InputPolicy(bos="none", skip_first=0)
    with lm.bind([one, two], policy=everywhere) as bound, torch.no_grad():
        found = bound(tokens).logits
        assert bound.policy == everywhere
    torch.testing.assert_close(found, lm.spliced_logits(tokens, {"layers.0": one.map, "layers.1": two.map}), **CLOSE)


def test_a_hook_that_fires_with_another_shape() -> None:
    """A module that is handed some tokens only, as an expert is."""

    class Some(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.expert = torch.nn.Embedding(100, 16), torch.nn.Linear(16, 16)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return torch.cat([self.expert(x[:, :3]), x[:, 3:]], dim=1)

    class Words:
        def __len__(self) -> int:
            return 100

    lm = LanguageModel(Some(), "some", Words())
    with lm.bind({"e": LinearCoder("expert@out", 16)}) as bound, pytest.raises(ModelError) as caught:
        bound(some_tokens())
    assert str(caught.value) == (
        "expert@out: fired with [2, 3, 16] in a pass of [2, 9] tokens; coder 'e' needs one row a token"
    )


def test_a_module_that_runs_twice_is_spliced_twice() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    module = Twice()
    coder = LinearCoder("inner@out", 16)
    x = torch.randn(4, 16)
    with LanguageModel(module, "twice").bind(coder) as bound, torch.no_grad():
        found = bound(x).logits
        torch.testing.assert_close(found, coder.map(module.inner(coder.map(module.inner(x)))), **CLOSE)
        moved = bound(x, interventions=[Set(latent=0, value=2.0)])
        assert (moved.codes["inner-out"].dense()[..., 0] == 2.0).all()


def test_what_is_no_coder_is_refused() -> None:
    with pytest.raises(ModelError, match="dict is no coder"), tiny("llama").bind({"a": {}}):
        pass
    with pytest.raises(ModelError, match="there is no coder to bind"), tiny("llama").bind():
        pass


def test_an_exception_inside_leaves_the_model_as_it_was() -> None:
    lm, tokens = LanguageModel(raw_model("llama"), "fresh"), some_tokens()
    before = lm.logits(tokens)

    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    coder = LinearCoder("layers.1", 16)
    coder.encode = fail  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError), lm.bind(coder) as bound:
        bound(tokens)
    with pytest.raises(ZeroDivisionError):
        lm.spliced_logits(tokens, {"layers.0": fail})
    assert torch.equal(lm.logits(tokens), before)
    with torch.no_grad():
        assert torch.equal(lm.model(input_ids=tokens).logits, before)


def test_nested_and_repeated_bindings_are_independent() -> None:
    lm, tokens = LanguageModel(raw_model("llama"), "fresh"), some_tokens()
    one, two = LinearCoder("layers.1", 16), LinearCoder("layers.1", 16, seed=9)
    alone = {}
    with torch.no_grad():
        for key, coder in (("one", one), ("two", two)):
            with lm.bind(coder) as bound:
                alone[key] = bound(tokens).logits
        with lm.bind(one) as outer, lm.bind(two) as inner:
            assert torch.equal(inner(tokens).logits, alone["two"])
            assert torch.equal(outer(tokens).logits, alone["one"])
            assert torch.equal(outer.raw(tokens), lm.logits(tokens))
        for _ in range(20):
            with lm.bind(one) as bound:
                bound(tokens)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
    assert hooks <= 3  # layer 1's output, and the width probe's


def test_a_pass_inside_a_pass() -> None:
    """A handler that runs the bare model itself (as a steering probe might) does not meet its own splice."""
    lm, tokens = tiny("llama"), some_tokens()
    bare = lm.logits(tokens)
    inner: list[Tensor] = []

    def edit(x: Tensor) -> Tensor:
        inner.append(lm.logits(tokens))
        return x * 0

    outer = lm.spliced_logits(tokens, {"layers.1": edit})
    assert torch.equal(inner[0], bare)
    torch.testing.assert_close(outer, lm.spliced_logits(tokens, {"layers.1": torch.zeros_like}))


def test_two_language_models_over_one_module() -> None:
    model, tokens = raw_model("llama"), some_tokens()
    a, b = LanguageModel(model, "a"), LanguageModel(model, "b")
    count: list[int] = []
    for lm in (a, b):
        lm.run(tokens, {"layers.1": lambda x: x + 0})
    a.run(tokens, {"layers.1": lambda x: count.append(1) or x})
    assert count == [1]


def test_a_binding_ends_with_its_with() -> None:
    with tiny("llama").bind(LinearCoder("layers.1", 16)) as bound:
        pass
    with pytest.raises(ModelError, match="this binding has ended"):
        bound(some_tokens())


def test_stopping_early() -> None:
    with tiny("llama").bind(topk_coder("layers.1", 16)) as bound:
        out = bound(some_tokens(), logits=False)
    assert out.logits is None
    assert out.codes["layers.1"].leading == (2, 9)
    assert out.codes["layers.1"].uniform_k == 4


@pytest.mark.parametrize(
    ("coders", "says"),
    [
        ([], "there is no coder to bind"),
        (LinearCoder("layers.1", 8), r"coder 'layers.1' reads 8 values at blocks.1.resid_post, which is 16 wide"),
        (LinearCoder("layers.1", 16, "blocks.1.mlp_act"), r"writes 16 values at blocks.1.mlp_act, which is 32 wide"),
        (LinearCoder("layers.9", 16), "there is no layer 9"),
        ([LinearCoder("layers.1", 16), LinearCoder("layers.1", 16)], "two coders have one name"),
        (
            {"a": LinearCoder("layers.1", 16), "b": LinearCoder("resid_post.1", 16)},
            "coders 'a' and 'b' both write blocks.1.resid_post",
        ),
        (
            {"a": LinearCoder("layers.1", 16), "b": LinearCoder("layers.2", 16, policy=InputPolicy(bos="context"))},
            "coders disagree on how text is fed: 'a' has bos 'none', 'b' has 'context'",
        ),
    ],
)
def test_coders_that_do_not_fit(coders: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says), tiny("llama").bind(coders):
        pass


def test_error_mode_is_checked() -> None:
    with pytest.raises(ModelError, match="error is 'both'; allowed: drop, keep"):
        error_mode("both")


def test_two_edits_of_one_place_are_refused() -> None:
    with pytest.raises(ModelError, match=r"resid_post\.1: two edits of blocks\.1\.resid_post"):
        tiny("llama").spliced_logits(some_tokens(), {"layers.1": torch.clone, "resid_post.1": torch.clone})


def test_an_edit_of_another_shape_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"blocks.1.resid_post: the edit returned \[2, 9\], the activation is \[2, 9, 16\]"
    ):
        tiny("llama").spliced_logits(some_tokens(), {"layers.1": lambda x: x[..., 0]})


def test_a_coder_of_another_architecture_is_an_error_and_of_other_weights_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = tiny("llama")
    same = lm.fingerprint

    def bind(**changes: Any) -> None:
        made_for = ModelFingerprint(**{**same.model_dump(), **changes})
        with lm.bind(LinearCoder("layers.1", 16, policy=EVERYWHERE, model=made_for)):
            pass

    bind()
    assert not caplog.records
    with pytest.raises(
        ModelError, match=r"coder 'layers.1' was trained on other \(n_layers 12\); tiny-llama has n_layers 3"
    ):
        bind(name="other", n_layers=12)
    with pytest.raises(ModelError, match="family gpt2"):
        bind(family="gpt2")
    bind(weights_hash="0" * 16)
    assert "other weights" in caplog.text
    caplog.clear()
    bind(name="renamed", weights_hash=None)
    assert "was trained on renamed; this model is tiny-llama" in caplog.text
