"""Capture: many hooks in one truncated pass, positions, packed documents, inputs that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm import LanguageModel, policy_mask
from unmix.lm.tokens import document_positions

from .fakes import topk_coder
from .families import CONFIGS, raw_model, some_tokens, tiny


def test_the_pass_ends_at_the_last_hook_needed() -> None:
    lm = LanguageModel(raw_model("llama"), "fresh")
    ran: list[str] = []
    for layer in range(3):
        block = lm.model.model.layers[layer]
        block.mlp.register_forward_hook(lambda *_, name=f"mlp{layer}": ran.append(name))
        block.self_attn.register_forward_hook(lambda *_, name=f"attn{layer}": ran.append(name))
    lm.capture(some_tokens(), ["blocks.1.mlp_in", "blocks.0.resid_post"])
    assert ran == ["attn0", "mlp0", "attn1"]


def test_capture_keeps_no_graph_and_changes_nothing() -> None:
    lm = LanguageModel(raw_model("gpt2"), "fresh")
    before = lm.logits(some_tokens())
    found = lm.capture(some_tokens(), "layers.1")["layers.1"]
    assert not found.requires_grad
    torch.testing.assert_close(lm.logits(some_tokens()), before, rtol=0, atol=0)


def test_keys_are_the_names_as_given() -> None:
    acts = tiny("llama").capture(some_tokens(), ["layers.1", "blocks.1.resid_post", "resid_post.1"])
    assert list(acts) == ["layers.1", "blocks.1.resid_post", "resid_post.1"]
    assert torch.equal(acts["layers.1"], acts["resid_post.1"])


def test_positions() -> None:
    lm, tokens = tiny("llama"), some_tokens(3, 7)
    whole = lm.capture(tokens, "layers.0")["layers.0"]
    assert torch.equal(lm.capture(tokens, "layers.0", positions=[0, 6])["layers.0"], whole[:, [0, 6]])
    mask = policy_mask(tokens, InputPolicy(skip_first=2))
    assert torch.equal(lm.capture(tokens, "layers.0", positions=mask)["layers.0"], whole[:, 2:].reshape(-1, 16))


@pytest.mark.parametrize(
    "form", [lambda t: t, lambda t: t.int(), lambda t: t.numpy().astype(np.uint32), lambda t: t.tolist()]
)
def test_forms_of_token_ids(form: object) -> None:
    lm, tokens = tiny("llama"), some_tokens()
    found = lm.capture(form(tokens), "layers.1")["layers.1"]  # type: ignore[operator]
    assert torch.equal(found, lm.capture(tokens, "layers.1")["layers.1"])
    assert lm.capture(tokens[0], "layers.1")["layers.1"].shape == (1, 9, 16)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (torch.tensor([[1, 100]]), "token id 100: tiny-llama has ids 0 to 99"),
        (torch.tensor([[-1, 5]]), "token id -1: tiny-llama has ids 0 to 99"),
        (torch.zeros(2, 3), r"found torch\.float32 \[2, 3\]"),
        (torch.zeros(0, 3, dtype=torch.int64), r"found torch\.int64 \[0, 3\]"),
        (torch.ones(1, 65, dtype=torch.int64), "a context of 65 tokens: tiny-llama takes at most 64"),
        ([[1, 2], [3]], r"must be a text or token ids \[pos\] or \[batch, pos\]"),
        (["a", "b"], r"must be a text or token ids"),
        ("some text", "tiny-llama came without a tokenizer: give token ids"),
    ],
)
def test_inputs_that_do_not_fit(inputs: object, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        tiny("llama").capture(inputs, "layers.1")


def packed() -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Two rows; the first holds three documents (lengths 4, 1, 6), the second two (5, 6)."""
    documents = torch.tensor([[7, 7, 7, 7, 8, 9, 9, 9, 9, 9, 9], [9, 9, 9, 9, 9, 10, 10, 10, 10, 10, 10]])
    return some_tokens(2, 11, seed=3), documents, [(0, 0, 4), (0, 4, 5), (0, 5, 11), (1, 0, 5), (1, 5, 11)]


@pytest.mark.parametrize("family", list(CONFIGS))
def test_packed_documents_are_as_if_alone(family: str) -> None:
    lm = tiny(family)
    tokens, documents, spans = packed()
    apart = InputPolicy(attend_across=False)
    found = lm.capture(tokens, "layers.2", policy=apart, documents=documents)["layers.2"]
    for row, start, end in spans:
        alone = lm.capture(tokens[row, start:end], "layers.2")["layers.2"][0]
        torch.testing.assert_close(found[row, start:end], alone, atol=2e-5, rtol=1e-4)


def test_policy_decides_whether_documents_matter() -> None:
    lm = tiny("llama")
    tokens, documents, _ = packed()
    plain = lm.capture(tokens, "layers.2")["layers.2"]
    across = lm.capture(tokens, "layers.2", policy=InputPolicy(), documents=documents)["layers.2"]
    apart = lm.capture(tokens, "layers.2", documents=documents)["layers.2"]
    assert torch.equal(plain, across)
    assert not torch.allclose(plain, apart)
    torch.testing.assert_close(lm.unembed(apart), lm.logits(tokens, documents), atol=2e-5, rtol=1e-4)


def test_documents_must_have_the_tokens_shape() -> None:
    with pytest.raises(ModelError, match=r"documents are \[1, 3\], the tokens are \[2, 9\]"):
        tiny("llama").capture(some_tokens(), "layers.1", documents=torch.tensor([0, 0, 1]))


def test_document_positions() -> None:
    ids = torch.tensor([[5, 5, 5, 6, 7, 7], [1, 1, 1, 1, 1, 1]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_policy_mask() -> None:
    tokens = torch.tensor([[1, 5, 0, 6], [1, 0, 7, 8]])
    policy = InputPolicy(skip_first=1, skip_ids=(0, 8))
    assert policy_mask(tokens, policy).tolist() == [[False, True, False, True], [False, False, True, False]]
    assert policy_mask(tokens, policy, start=1).tolist() == [[True, True, False, True], [True, False, True, False]]
    assert policy_mask(tokens, InputPolicy(skip_first=0)).all()


def test_a_module_that_never_runs_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    lm = LanguageModel(Idle(), "idle")
    with pytest.raises(ModelError, match="never ran in the forward pass: idle@out; the model does not call"):
        lm.capture(torch.ones(2, 3), ["used", "idle"])


def test_plain_modules_take_their_own_inputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    lm, x = LanguageModel(net, "mlp"), torch.randn(5, 4)
    acts = lm.capture(x, ["0", "2@in"])
    torch.testing.assert_close(acts["0"], net[0](x))
    torch.testing.assert_close(acts["2@in"], net[0](x).relu())
    assert torch.equal(lm.run(x).logits, net(x))


@pytest.mark.parametrize("container", ["tuple", "list", "dict", "named"])
def test_outputs_in_containers_are_read_and_replaced(container: str) -> None:
    from collections import namedtuple

    pair = namedtuple("Pair", "hidden extra")

    class Inner(nn.Module):
        def forward(self, *, hidden_states: torch.Tensor, scale: float) -> object:
            y = hidden_states * scale
            options = {"tuple": (y, "x"), "list": [y, "x"], "dict": {"h": y, "e": "x"}, "named": pair(y, "x")}
            return options[container]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.inner(hidden_states=x, scale=2.0)
            assert type(out).__name__ == {"named": "Pair"}.get(container, container)
            hidden, extra = out.values() if isinstance(out, dict) else out
            assert extra == "x"
            return hidden + 1

    lm, x = LanguageModel(Outer(), "outer"), torch.arange(3.0)
    assert torch.equal(lm.capture(x, "inner@in")["inner@in"], x)
    assert torch.equal(lm.run(x, {"inner@out": lambda y: y * 10}).logits, x * 20 + 1)
    assert torch.equal(lm.run(x, {"inner@in": lambda y: y + 1}).logits, (x + 1) * 2 + 1)


LOOSE = {"atol": 2e-5, "rtol": 1e-4}
ROWS = [some_tokens(1, n, seed=n)[0] for n in (3, 8, 5)]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one batch, and where its tokens are real."""
    tokens, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.bool)
    for i, row in enumerate(ROWS):
        where = slice(8 - len(row), 8) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    return tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_padded_texts_are_as_if_alone(family: str, side: str) -> None:
    """In float32 to 2e-5: the order of additions differs, nothing else."""
    lm, (tokens, mask) = tiny(family), padded(side)
    hooks = ["blocks.0.z", "blocks.1.mlp_in", "blocks.2.resid_post"]
    found = lm.capture(tokens, hooks, attention_mask=mask)
    kept = lm.capture(tokens, hooks[-1], positions=mask, attention_mask=mask)[hooks[-1]]
    for i, row in enumerate(ROWS):
        alone = lm.capture(row, hooks)
        for hook in hooks:
            torch.testing.assert_close(found[hook][i][mask[i]], alone[hook][0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(kept, torch.cat([lm.capture(row, hooks[-1])[hooks[-1]][0] for row in ROWS]), **LOOSE)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "gemma2", "gemma3", "opt", "phi"])
def test_token_by_token_with_a_cache_is_the_whole_pass(family: str) -> None:
    """Past sliding windows of 4 too."""
    lm, tokens = tiny(family), some_tokens(2, 9)
    hooks = ["blocks.1.z", "blocks.1.resid_mid" if "blocks.1.resid_mid" in lm.hooks() else "blocks.1.mlp_in"]
    whole = lm.capture(tokens, hooks)
    first = lm.run(tokens[:, :4], capture=hooks, use_cache=True)
    parts, cache = {hook: [first.activations[hook]] for hook in hooks}, first.cache
    with torch.no_grad():
        for place in range(4, 9):
            step = lm.run(tokens[:, place : place + 1], capture=hooks, cache=cache, use_cache=True)
            cache = step.cache
            for hook in hooks:
                parts[hook].append(step.activations[hook])
    for hook in hooks:
        torch.testing.assert_close(torch.cat(parts[hook], dim=1).detach(), whole[hook], **LOOSE)


def test_a_cache_goes_with_left_padding() -> None:
    lm, (tokens, mask) = tiny("llama"), padded("left")
    whole = lm.capture(tokens, "layers.1", attention_mask=mask)["layers.1"]
    first = lm.run(tokens[:, :6], capture=["layers.1"], use_cache=True, attention_mask=mask[:, :6])
    second = lm.run(tokens[:, 6:], capture=["layers.1"], cache=first.cache, use_cache=True, attention_mask=mask)
    torch.testing.assert_close(second.activations["layers.1"].detach(), whole[:, 6:], **LOOSE)


def test_a_cache_of_a_pass_that_ends_early_is_refused() -> None:
    with pytest.raises(ModelError, match="a pass that ends early leaves no whole cache"):
        tiny("llama").run(some_tokens(), capture=["layers.0"], logits=False, use_cache=True)


def test_padding_and_documents_do_not_go_together() -> None:
    tokens, mask = padded("left")
    with pytest.raises(ModelError, match="packed documents and padding do not go together"):
        tiny("llama").capture(tokens, "layers.1", documents=torch.zeros(3, 8), attention_mask=mask)


@pytest.mark.parametrize("positions", [[0, 6], torch.tensor([3]), torch.ones(3, 7, dtype=torch.bool).tril()])
@pytest.mark.parametrize("hook", ["layers.0", "blocks.1.z#2"])
def test_nothing_but_the_positions_wanted_is_kept(positions: object, hook: str) -> None:
    found = tiny("llama").capture(some_tokens(3, 7), hook, positions=positions)[hook]  # type: ignore[arg-type]
    assert found.untyped_storage().nbytes() == found.numel() * 4


def test_a_head_keeps_no_other_heads() -> None:
    found = tiny("llama").capture(some_tokens(), "blocks.1.z#2")["blocks.1.z#2"]
    assert found.untyped_storage().nbytes() == 2 * 9 * 4 * 4


def test_dtypes_and_devices_of_model_coder_and_results_may_differ() -> None:
    lm, tokens = LanguageModel(raw_model("llama").to(torch.bfloat16).requires_grad_(False), "bf16"), some_tokens()
    assert lm.capture(tokens, "layers.1")["layers.1"].dtype == torch.bfloat16
    found = lm.capture(tokens, "layers.1", dtype=torch.float32)["layers.1"]
    assert found.dtype == torch.float32
    assert torch.equal(found.to(torch.bfloat16), lm.capture(tokens, "layers.1")["layers.1"])
    # A CPU has one other device to hand out: the one that holds shapes alone.
    assert lm.capture(tokens, "layers.1", device="meta")["layers.1"].device.type == "meta"
    edited = lm.run(tokens, {"layers.1": lambda x: x.double() * 2, "blocks.0.resid_mid": lambda x: x.float() + 1})
    assert edited.logits is not None and edited.logits.dtype == torch.bfloat16
    for view in ("blocks.1.mlp_in~normalised", "blocks.1.resid_pre~centred"):
        assert lm.capture(tokens, view)[view].dtype == torch.bfloat16
        assert lm.spliced_logits(tokens, {view: lambda x: x.float() * 2}).dtype == torch.bfloat16


def test_a_bfloat16_model_gives_a_float32_coder_what_it_reads() -> None:
    model = raw_model("gpt2").requires_grad_(False)
    exact = LanguageModel(model, "float32").capture(some_tokens(), "layers.1")["layers.1"]
    coarse = LanguageModel(raw_model("gpt2").to(torch.bfloat16), "bf16").capture(some_tokens(), "layers.1")["layers.1"]
    coder = topk_coder("layers.1", 16)
    codes = coder.encode(coarse)
    assert codes.values.dtype == torch.float32
    assert torch.equal(codes.dense(), coder.encode(coarse.float()).dense())
    torch.testing.assert_close(coarse.float(), exact, atol=5e-2, rtol=5e-2)
