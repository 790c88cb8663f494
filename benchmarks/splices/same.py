"""What every contestant of the splice benchmark shares: one random GPT-2, one top-k coder, the same tokens."""

from __future__ import annotations

from typing import Any

CONTEXT = 128
VOCABULARY = 50257


KINDS = ("forward", "coder", "spliced", "kept")
"""What a contestant runs in turn: the bare pass, encode and decode alone, the spliced pass, that with errors kept."""


def kind_at(i: int) -> str:
    """What step `i` runs: all kinds in every round, each round beginning with another one."""
    turn, place = divmod(i, len(KINDS))
    return KINDS[(turn + place) % len(KINDS)]


def gpt2(d: int, layers: int) -> Any:
    """A GPT-2 of width `d` with random weights, always the same, in float32."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=d, n_layer=layers, n_head=d // 64, n_positions=1024, vocab_size=VOCABULARY)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def coder_weights(d: int, n_latents: int) -> dict[str, Any]:
    """Latent-major weights of a coder, always the same: unit decoder rows, the encoder their copy."""
    import torch

    random = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(n_latents, d, generator=random), dim=-1)
    return {"W_enc": rows.clone(), "W_dec": rows, "b_enc": torch.zeros(n_latents), "b_dec": torch.zeros(d)}


def tokens(count: int) -> Any:
    """[count / CONTEXT, CONTEXT] token ids."""
    import torch

    random = torch.Generator().manual_seed(2)
    return torch.randint(0, VOCABULARY, (max(1, count // CONTEXT), CONTEXT), generator=random)


def hook_layer(layers: int) -> int:
    """The middle block."""
    return layers // 2


def mean_square(logits: Any) -> str:
    """Of a pass: contestants that agree on it compute the same."""
    return f"{float(logits.square().mean()):.6f}"
