"""Records Qwen Scope: no package holds its maths, which its model cards give as a formula; torch 2.13.0."""

from __future__ import annotations

import json

import torch
from scopes_recording import ROWS, D, F, Weights, fresh, record

K = 6
FORMULA = "f = TopK_k(x W_encᵀ + b_enc), x̂ = f W_decᵀ + b_dec"


@torch.no_grad()
def main() -> None:
    """A repository of two layers with its config, and one file whose folder alone says k."""
    for seed, kind, repo in ((71, "with_config", "own-name"), (72, "by_name", "SAE-Res-Qwen3-1.7B-Base-W48-L0_6")):
        draw, out = Weights(seed), fresh("qwen_scope", kind)
        (out / repo).mkdir()
        expected: dict[str, torch.Tensor] = {}
        for layer in (3, 11):
            w, x = draw.affine(), draw.normal(ROWS, D, scale=1.5)
            w["b_enc"] -= 1.5  # rows with fewer than k positive pre-activations: negative ones are then selected
            z = x @ w["W_enc"] + w["b_enc"]
            best = z.topk(K, dim=-1)
            assert (best.values < 0).any() and (best.values > 0).any()
            acts = torch.zeros_like(z).scatter(-1, best.indices, best.values)
            state = {"W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()}
            state |= {"b_enc": w["b_enc"], "b_dec": w["b_dec"]}
            torch.save(state, out / repo / f"layer{layer}.sae.pt")
            recon = acts @ w["W_dec"] + w["b_dec"]
            expected |= {f"x.{layer}": x, f"acts.{layer}": acts, f"recon.{layer}": recon}
        if kind == "with_config":
            tree = {
                "model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D, "d_sae": F, "k": K,
                "num_layers": 28, "hook_point": "resid_post", "dtype": "float32",
            }  # fmt: skip
            (out / repo / "config.json").write_text(json.dumps(tree))
        record(out, repo, expected, FORMULA, transcribed=True)


if __name__ == "__main__":
    main()
