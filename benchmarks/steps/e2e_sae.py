"""The step of e2e_sae 2.1.1, with its own model wrapper and its own loss: KL and sparsity on one hook.

Its wheel lacks the module its loader imports, which stands here as an empty one; nothing of it is used. The loop around
the loss is as its repository has it: zero gradients, backward, clip at 10, Adam, the model's parameters frozen.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from benchmarks._worker import Contestant, Shape, serve
from benchmarks.steps.e2e_model import CONTEXT, SIZES, tokens

MISSING = "e2e_sae.scripts.train_tlens.run_train_tlens"


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """A ReLU coder behind the first of two blocks; the variant is the size of the vocabulary."""
    for name in (MISSING.rpartition(".")[0], MISSING):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[MISSING].HookedTransformerPreConfig = object  # pyright: ignore[reportAttributeAccessIssue]
    from importlib.metadata import version

    import torch
    from e2e_sae.losses import LogitsKLLoss, LossConfigs, SparsityLoss, calc_loss
    from e2e_sae.models.transformers import SAETransformer
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    vocabulary = int(variant or 50257)
    hook = "blocks.0.hook_resid_post"
    config = HookedTransformerConfig(
        n_layers=SIZES["layers"], d_model=shape.d, n_ctx=CONTEXT, d_head=shape.d // SIZES["heads"],
        n_heads=SIZES["heads"], d_mlp=4 * shape.d, d_vocab=vocabulary, act_fn="gelu_new", normalization_type="LN",
        device="cpu",
    )  # fmt: skip
    model = SAETransformer(HookedTransformer(config), [hook], shape.n_latents / shape.d)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("saes.")
    model.saes.train()
    losses = LossConfigs(
        sparsity=SparsityLoss(coeff=1e-3 * shape.d), in_to_orig=None, out_to_orig=None, out_to_in=None,
        logits_kl=LogitsKLLoss(coeff=1.0),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.saes.parameters(), lr=8e-4)
    data = tokens(shape.tokens, vocabulary)

    def step(i: int) -> None:
        batch = data[i % len(data)]
        optimiser.zero_grad()
        with torch.inference_mode():
            logits, acts = model.forward_raw(batch, run_entire_model=True)
        new_logits, new_acts = model.forward(batch, sae_positions=[hook])
        loss, _ = calc_loss(acts, new_acts, logits, new_logits, losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.saes.parameters(), 10.0)
        optimiser.step()

    def reconstruct(x: Any) -> Any:
        return model.saes[hook.replace(".", "-")](x)[0]

    return Contestant(
        step, reconstruct, {"e2e_sae": version("e2e_sae"), "transformer_lens": version("transformer_lens")}
    )


if __name__ == "__main__":
    serve(build)
