"""Two small models that name their hooks as TransformerLens' two kinds do, so that CI needs no TransformerLens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

D, HEADS, SIZE, NEURONS, VOCAB, LAYERS = 12, 3, 4, 20, 30, 2


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(D) + 0.5)
        self.hook_in, self.hook_normalized, self.hook_out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook_in(x)
        return self.hook_out(self.hook_normalized(nn.functional.layer_norm(x, (D,))) * self.w)


class Attention(nn.Module):
    """Causal averages of values: enough to mix positions."""

    def __init__(self) -> None:
        super().__init__()
        self.W_V, self.W_O = (
            nn.Parameter(torch.randn(D, HEADS, SIZE) / 3),
            nn.Parameter(torch.randn(HEADS, SIZE, D) / 3),
        )
        self.hook_in, self.hook_z, self.hook_out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, query_input: Tensor, key_input: Tensor, value_input: Tensor) -> Tensor:
        value_input = self.hook_in(value_input)
        v = torch.einsum("bpd,dhs->bphs", value_input, self.W_V)
        z = self.hook_z(v.cumsum(1) / torch.arange(1, v.shape[1] + 1).view(1, -1, 1, 1))
        return self.hook_out(torch.einsum("bphs,hsd->bpd", z, self.W_O))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_in, self.W_out = nn.Parameter(torch.randn(D, NEURONS) / 3), nn.Parameter(torch.randn(NEURONS, D) / 3)
        self.hook_in, self.hook_post, self.hook_out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_out(self.hook_post((self.hook_in(x) @ self.W_in).relu()) @ self.W_out)


class Block(nn.Module):
    """`hooked`: the stream's hooks are on the stream; else the bridge's, at the borders of modules."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.hooked = hooked
        self.ln1, self.attn, self.ln2, self.mlp = Norm(), Attention(), Norm(), MLP()
        names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post") if hooked else ("in", "out")
        for name in names:
            setattr(self, f"hook_{name}", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            x = self.hook_in(x)
            x = x + self._attend(x)
            return self.hook_out(x + self.mlp(self.ln2(x)))
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self._attend(x)))
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(x))))

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn(query_input=self.ln1(x), key_input=self.ln1(x), value_input=self.ln1(x))


class TinyLens(nn.Module):
    """`hooked=True`: as `HookedTransformer`; else as `TransformerBridge`, whose older names are further names."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cfg = SimpleNamespace(
            n_layers=LAYERS, d_model=D, n_heads=HEADS, d_head=SIZE, d_vocab=VOCAB, n_ctx=16, model_name="tiny-lens",
            original_architecture="GPT2LMHeadModel", parallel_attn_mlp=False, output_logits_soft_cap=5.0,
        )  # fmt: skip
        self.embedding, self.hook_embed = nn.Embedding(VOCAB, D), nn.Identity()
        self.blocks = nn.ModuleList([Block(hooked) for _ in range(LAYERS)])
        self.ln_final, self.unembed = Norm(), nn.Linear(D, VOCAB)
        self.hook_dict = {name: m for name, m in self.named_modules() if name.rpartition(".")[2].startswith("hook_")}
        inner = ("hook_in", "hook_out") if hooked else ()
        for name in [n for n in self.hook_dict if hooked and n.rpartition(".")[2] in inner]:
            del self.hook_dict[name]  # `HookedTransformer` has none at the borders of its modules
        if not hooked:
            for i in range(LAYERS):
                for theirs, real in {
                    "hook_resid_pre": "hook_in", "hook_resid_post": "hook_out", "hook_resid_mid": "ln2.hook_in",
                    "hook_attn_out": "attn.hook_out", "hook_mlp_out": "mlp.hook_out",
                }.items():  # fmt: skip
                    self.hook_dict[f"blocks.{i}.{theirs}"] = self.hook_dict[f"blocks.{i}.{real}"]

    @property
    def W_U(self) -> Tensor:
        return self.unembed.weight.T

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.hook_embed(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return 5 * torch.tanh(self.unembed(self.ln_final(x)) / 5)

    def cache(self, tokens: Tensor) -> dict[str, Any]:
        """What every hook sees."""
        found: dict[str, Any] = {}
        handles = [
            hook.register_forward_hook(lambda _, __, out, n=name: found.__setitem__(n, out))
            for name, hook in self.hook_dict.items()
        ]
        self(tokens)
        for handle in handles:
            handle.remove()
        return found
