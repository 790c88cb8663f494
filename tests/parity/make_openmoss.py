"""Records the three forms of OpenMOSS: Llama Scope, R1-Distill, Llamascopium.

Run once a form, each with the code that wrote or reads it: `make_openmoss.py llama_scope` with Language-Model-SAEs at
1e710367 (October 2024) on the path, `make_openmoss.py llama_scope_r1` at 9c97b678 (February 2025), and
`make_openmoss.py llamascopium` with llamascopium 2.0.0b34 installed. torch 2.13.0, transformer_lens 2.x.
"""

from __future__ import annotations

import json
import sys
import typing
from math import sqrt
from pathlib import Path

import torch
import typing_extensions
from scopes_recording import ROWS, D, F, Weights, fresh, gates, record, save
from torch import Tensor

typing.override = typing_extensions.override  # their code wants Python 3.12
RESID = "blocks.3.hook_resid_post"
TRANSCODER = ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")


def linear(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of two `nn.Linear`."""
    return {
        "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
        "decoder.bias": w["b_dec"],
    }  # fmt: skip


def llama_scope() -> None:
    """`hyperparams.json` + `checkpoints/final.safetensors`; the peer folds scales and norms in when it loads."""
    from lm_saes.config import SAEConfig
    from lm_saes.sae import SparseAutoEncoder

    kinds = {
        "L3R": ("Llama3_1-8B-Base-L3R-8x", (RESID, RESID), (7.5, 7.5), True, 0.6),
        "L3TC": ("Llama3_1-8B-Base-L3TC-8x", TRANSCODER, (4.0, 1.5), True, 0.15),
        "without_norms": ("Llama3_1-8B-Base-L3M-8x", (TRANSCODER[1],) * 2, (2.5, 2.5), False, 0.3),
    }
    for seed, (kind, (name, hooks, norms, include, theta)) in enumerate(kinds.items(), 21):
        draw, out = Weights(seed), fresh("llama_scope", kind)
        w, x = draw.affine(), draw.normal(ROWS, D, scale=norms[0] / sqrt(D))
        save(out / name / "checkpoints" / "final.safetensors", linear(w))
        hyper = {
            "device": "cpu", "seed": 42, "dtype": "torch.float32", "hook_point_in": hooks[0],
            "hook_point_out": hooks[1], "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False,
            "expansion_factor": F // D, "d_model": D, "d_sae": F, "bias_init_method": "all_zero",
            "act_fn": "jumprelu", "jump_relu_threshold": theta, "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": norms[0], "out": norms[1]},
            "decoder_exactly_fixed_norm": False, "sparsity_include_decoder_norm": include, "use_glu_encoder": False,
            "init_decoder_norm": 0.5, "init_encoder_norm": None, "init_encoder_with_decoder_transpose": True,
            "lp": 1, "l1_coefficient": 0.00008, "l1_coefficient_warmup_steps": 0.1, "top_k": 50,
            "k_warmup_steps": 0.1, "use_batch_norm_mse": True, "use_ghost_grads": False, "tp_size": 1, "ddp_size": 1,
        }  # fmt: skip
        (out / name / "hyperparams.json").write_text(json.dumps(hyper))
        theirs = SparseAutoEncoder.from_config(SAEConfig.from_pretrained(str(out / name)))
        folded, pre = theirs.encode(x, return_hidden_pre=True)
        gates(pre, folded)
        # What the codes are of the weights as stored: the peer's z is in raw output units.
        unit = w["W_dec"].norm(dim=-1) * norms[1] / sqrt(D) if include else torch.full((F,), norms[0] / sqrt(D))
        expected = {"x": x, "acts": folded / unit, "acts_folded": folded, "unit": unit, "recon": theirs.decode(folded)}
        record(out, name, expected, "Language-Model-SAEs", version="1e710367", transcribed=False)


def llama_scope_r1() -> None:
    """`config.json` + `sae_weights.safetensors` with the Linear names."""
    from lm_saes.config import SAEConfig
    from lm_saes.sae import SparseAutoEncoder

    class Config(SAEConfig):
        force_unit_decoder_norm: bool = False  # the commit's own model asks for it, and its config lacks it

    for seed, (kind, include) in enumerate({"L3R": True, "without_norms": False}.items(), 31):
        draw, out = Weights(seed), fresh("llama_scope_r1", kind)
        w, x, norm = draw.affine(), draw.normal(ROWS, D, scale=2.0), 7.5
        tree = {
            "sae_type": "sae", "hook_point_in": RESID, "hook_point_out": RESID, "d_model": D,
            "expansion_factor": F // D, "use_decoder_bias": True, "use_glu_encoder": False, "act_fn": "jumprelu",
            "jump_relu_threshold": 0.0, "apply_decoder_bias_to_pre_encoder": False, "norm_activation": "dataset-wise",
            "sparsity_include_decoder_norm": include, "force_unit_decoder_norm": False, "top_k": 50,
            "jumprelu_threshold_window": 2.0,
        }  # fmt: skip
        place = "400M-Slimpajama-400M-OpenR1-Math-220k/L3R"
        sae = SparseAutoEncoder(Config.model_validate(tree | {"device": "cpu", "dtype": torch.float32}))
        sae.load_state_dict(linear(w) | {"log_jumprelu_threshold": draw.between(-1.0, 0.8, F)})
        sae.set_dataset_average_activation_norm({RESID: norm})
        save(out / place / "sae_weights.safetensors", sae._get_full_state_dict())
        (out / place / "config.json").write_text(json.dumps(tree))
        acts, pre = sae.encode(x, return_hidden_pre=True)
        gates(pre, acts)
        recon = sae.decode(acts) * norm / sqrt(D)  # its decode stays in the normalised space
        expected = {"x": x, "acts": acts, "recon": recon}
        record(out, place, expected, "Language-Model-SAEs", version="9c97b678", transcribed=False)


def llamascopium() -> None:
    """`config.json` + `sae_weights.safetensors` with `W_E`, written by the peer itself."""
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    same, other = (RESID, RESID), TRANSCODER
    kinds = {
        "jumprelu": (same, {"act_fn": "jumprelu"}),
        "jumprelu_transcoder": (other, {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False}),
        "jumprelu_inference": (same, {"act_fn": "jumprelu"}),
        "topk": (same, {"act_fn": "topk", "top_k": 6}),
        "topk_token_wise": (same, {"act_fn": "topk", "top_k": 6, "norm_activation": "token-wise"}),
        "batchtopk": (other, {"act_fn": "batchtopk", "top_k": 6}),
        "relu_no_bias": (same, {"act_fn": "relu", "use_decoder_bias": False}),
    }
    for seed, (kind, (hooks, settings)) in enumerate(kinds.items(), 41):
        draw, out = Weights(seed), fresh("llamascopium", kind)
        w, x = draw.affine(), draw.normal(ROWS, D, scale=2.0)
        cfg = SAEConfig(hook_point_in=hooks[0], hook_point_out=hooks[1], d_model=D, expansion_factor=F / D, **settings)
        sae = SparseAutoEncoder(cfg)
        state = {"W_E": w["W_enc"], "b_E": w["b_enc"] - 0.2, "W_D": w["W_dec"], "b_D": w["b_dec"]}
        if cfg.act_fn == "jumprelu":
            state["activation_function.log_jumprelu_threshold"] = draw.between(-1.0, 0.8, F)
        if not cfg.use_decoder_bias:
            del state["b_D"]
        sae.load_state_dict(state)
        if cfg.norm_activation == "dataset-wise":
            sae.set_dataset_average_activation_norm({hooks[0]: 7.5, hooks[1]: 7.5 if hooks is same else 2.0})
        place = "L3R-8x"
        (out / place).mkdir()
        # Where it has no norms to save, the peer saves memory that nobody wrote.
        sae.save_pretrained(out / place, fold_activation_scale=kind.endswith("inference"))
        cfg.save_hyperparameters(out / place)
        theirs = SparseAutoEncoder.from_pretrained(str(out / place))
        batch, scales = theirs.normalize_activations({hooks[0]: x}, return_scale_factor=True)
        acts, pre = theirs.encode(batch[hooks[0]], return_hidden_pre=True)
        if cfg.act_fn != "relu":
            gates(pre, acts)
        way_back = theirs.compute_norm_factor(x, hooks[1]) if hooks is other else scales[hooks[0]]
        expected = {"x": x, "acts": acts, "recon": theirs.decode(acts) / way_back}
        record(out, place, expected, "llamascopium", version="2.0.0b34", transcribed=False)


if __name__ == "__main__":
    with torch.no_grad():
        {f.__name__: f for f in (llama_scope, llama_scope_r1, llamascopium)}[Path(sys.argv[1]).name]()
