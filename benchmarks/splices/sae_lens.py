"""TransformerLens with SAELens (`run_with_saes`) on the same weights; the variant is the number of layers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from benchmarks._worker import Contestant, Shape, serve
from benchmarks.splices.same import VOCABULARY, coder_weights, gpt2, hook_layer, kind_at, mean_square, tokens


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """Its hooked transformer, weights neither folded nor centred, and its top-k coder."""
    import torch
    from sae_lens import HookedSAETransformer
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    layers = int(variant or 12)
    hook = f"blocks.{hook_layer(layers)}.hook_resid_pre"
    config = HookedTransformerConfig(
        n_layers=layers, d_model=shape.d, n_ctx=1024, d_head=64, n_heads=shape.d // 64, d_mlp=4 * shape.d,
        d_vocab=VOCABULARY, act_fn="gelu_new", normalization_type="LN", eps=1e-5, device="cpu",
    )  # fmt: skip
    model = HookedSAETransformer(config)
    state = convert_gpt2_weights(gpt2(shape.d, layers), config)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.eval().requires_grad_(False)
    sae = TopKSAE(TopKSAEConfig(d_in=shape.d, d_sae=shape.n_latents, k=shape.k, apply_b_dec_to_input=True))
    sae.cfg.metadata.hook_name = hook
    weights = coder_weights(shape.d, shape.n_latents)
    with torch.no_grad():
        sae.W_enc.copy_(weights["W_enc"].T)
        sae.W_dec.copy_(weights["W_dec"])
        sae.b_enc.copy_(weights["b_enc"])
        sae.b_dec.copy_(weights["b_dec"])
    sae.eval().requires_grad_(False)
    ids = tokens(shape.tokens)
    with torch.no_grad():
        at_hook = model.run_with_cache(ids, names_filter=hook, stop_at_layer=hook_layer(layers) + 1)[1][hook]

    @torch.no_grad()
    def forward() -> Any:
        return model(ids)

    @torch.no_grad()
    def alone() -> Any:
        return sae(at_hook)

    @torch.no_grad()
    def spliced(error: bool) -> Any:
        return model.run_with_saes(ids, saes=[sae], use_error_term=error)

    run = {"forward": forward, "coder": alone, "spliced": lambda: spliced(False), "kept": lambda: spliced(True)}
    shown = {name: version(name) for name in ("transformer-lens", "sae-lens")}
    shown |= {kind: mean_square(run[kind]()) for kind in run if kind != "coder"}
    return Contestant(lambda i: run[kind_at(i)](), sae, shown)


if __name__ == "__main__":
    serve(build)
