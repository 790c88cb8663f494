"""Write the older layouts of `sae_lens/` with the older packages themselves (SAELens 0.5–5, mats_sae_training).

Not a test and never run by one. Each call writes the kinds of one generation, run where that generation's package can
be imported (its dependencies of today are enough: torch 2.13.0, transformer-lens 2.16.1):

    PYTHONPATH=<unpacked sae_lens-5.11.0 wheel> python tests/parity/make_sae_lens_legacy.py tests/parity/sae_lens v5
    ... v4 (4.4.5), v3 (3.23.4), v2 (2.1.3), v0 (0.5.1)
    PYTHONPATH=<SAELens checked out at f554b161, of February 2024> ... mats
    PYTHONPATH=<SAELens checked out at 693c5b33, of March 2024> ... mats_group

Everything recorded is the peer's own code; only the weights are filled in here. Folders are as `make_sae_lens.py` says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D, F, ROWS = 16, 48, 8
RUNNER = {
    "model_name": "gpt2-small", "hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "d_in": D,
    "expansion_factor": F // D, "dataset_path": "some/dataset", "context_size": 64, "l1_coefficient": 8e-5,
    "lr": 4e-4, "checkpoint_path": "checkpoints", "log_to_wandb": False, "dtype": torch.float32,
}  # fmt: skip


def inputs(*shape: int) -> Tensor:
    x = torch.randn(*(shape or (ROWS, D)), generator=torch.Generator().manual_seed(1)) * 2
    x.view(-1, x.shape[-1])[0] *= 0.01
    return x


def fill(sae: Any, shift: float = -0.4) -> Any:
    """As in `make_sae_lens.py`; the fine-tuned factor runs from 0.5 to 1.5."""
    rng = torch.Generator().manual_seed(2)
    for name, p in sorted(sae.named_parameters()):
        value = torch.randn(p.shape, generator=rng)
        if name == "W_enc":
            value = value / D**0.5
        elif name == "W_dec":
            value = torch.nn.functional.normalize(value, dim=-1) * torch.linspace(0.5, 2.0, F)[:, None]
        elif name == "threshold":
            value = value.abs() * 0.4 + 0.1
        elif name in ("b_enc", "b_gate", "b_mag"):
            value = value * 0.3 + shift
        elif name == "r_mag":
            value = value * 0.3
        elif name == "finetuning_scaling_factor":
            value = torch.linspace(0.5, 1.5, F)
        elif name == "scaling_factor":
            value = torch.ones(F)
        else:
            value = value * 0.5
        p.data.copy_(value)
    return sae.eval()


def record(folder: Path, peer: str, version: str, x: Tensor, acts: Tensor, recon: Tensor, **extra: Tensor) -> None:
    tensors = {"x": x, "acts": acts, "recon": recon, **extra}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    told = {
        "peer": peer, "version": version, "torch": torch.__version__, "own_code": True,
        "command": f"python tests/parity/make_sae_lens_legacy.py tests/parity/sae_lens {sys.argv[2]}",
    }  # fmt: skip
    (folder / "recorded.json").write_text(json.dumps(told, indent=1) + "\n")


def place(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# SAELens 3 to 5: a flat config


def _flat(root: Path, name: str, **changes: Any) -> None:
    import sae_lens
    from sae_lens.sae import SAE, SAEConfig

    tree: dict[str, Any] = {
        "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3, "hook_head_index": None,
        "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "sae_lens_training_version": sae_lens.__version__, "prepend_bos": True,
        "dataset_path": "some/dataset", "dataset_trust_remote_code": True, "context_size": 64,
        "normalize_activations": "none", "neuronpedia_id": None, "model_from_pretrained_kwargs": {},
    }  # fmt: skip
    shift = changes.pop("shift", -0.4)
    sae = fill(SAE(SAEConfig.from_dict(tree | changes)), shift)
    folder = place(root, name)
    sae.save_model(str(folder), sparsity=torch.linspace(-10, -1, F))
    state = load_file(folder / "sae_weights.safetensors")
    if "finetuning_scaling_factor" in state:
        # The name that the peer's own loader looks for; under the one it saves it finds nothing and then refuses.
        state["scaling_factor"] = state.pop("finetuning_scaling_factor")
        save_file(state, folder / "sae_weights.safetensors")
    load = SAE.load_from_disk if hasattr(SAE, "load_from_disk") else SAE.load_from_pretrained
    loaded = load(str(folder)).eval()
    heads = str(changes.get("hook_name", "")).endswith("_z")
    x = inputs(ROWS, 4, D // 4) if heads else inputs()
    with torch.no_grad():
        acts = loaded.encode(x)
        recon = loaded.decode(acts)
    record(folder, "sae-lens", sae_lens.__version__, x.reshape(ROWS, D), acts, recon.reshape(ROWS, D))


def v5(root: Path) -> None:
    """Every kind of version 5."""
    _flat(root, "v5_standard")
    _flat(root, "v5_gated", architecture="gated", apply_b_dec_to_input=False)
    _flat(root, "v5_jumprelu", architecture="jumprelu", normalize_activations="layer_norm")
    _flat(root, "v5_topk", activation_fn_str="topk", activation_fn_kwargs={"k": 6}, shift=-1.6)
    _flat(root, "v5_constant_norm", normalize_activations="constant_norm_rescale")
    _flat(root, "v5_finetuned", finetuning_scaling_factor=True)
    _flat(root, "v5_hook_z", hook_name="blocks.3.attn.hook_z")


def v4(root: Path) -> None:
    """Version 4: one kind is enough, the layout is that of 5."""
    _flat(root, "v4_standard", architecture="standard", seqpos_slice=[2, None])


def v3(root: Path) -> None:
    """Version 3, and its first configs: a yes-or-no normalisation, no architecture."""
    _flat(root, "v3_jumprelu", architecture="jumprelu")
    _flat(root, "v3_finetuned", finetuning_scaling_factor=True)
    _flat(root, "v3_bool", apply_b_dec_to_input=False)
    folder = root / "v3_bool"
    cfg = json.loads((folder / "cfg.json").read_text())
    for key in ("architecture", "activation_fn_kwargs", "dataset_trust_remote_code", "neuronpedia_id"):
        del cfg[key]
    cfg["normalize_activations"] = False
    (folder / "cfg.json").write_text(json.dumps(cfg))
    state = load_file(folder / "sae_weights.safetensors")
    save_file({**state, "scaling_factor": torch.ones(F)}, folder / "sae_weights.safetensors")


# SAELens 0.2 to 2: the whole runner config


def _runner(root: Path, name: str, factor: Tensor, **changes: Any) -> None:
    import sae_lens
    from sae_lens.training.config import LanguageModelSAERunnerConfig
    from sae_lens.training.sparse_autoencoder import SparseAutoencoder

    cfg: Any = LanguageModelSAERunnerConfig(**(RUNNER | {"verbose": False} | changes))
    sae = fill(SparseAutoencoder(cfg))
    sae.scaling_factor.data.copy_(factor)
    folder = place(root, name)
    sae.save_model(str(folder), sparsity=torch.linspace(-10, -1, F))
    x = inputs()
    with torch.no_grad():
        out = sae(x)
    record(folder, "sae-lens", getattr(sae_lens, "__version__", "0.5.1"), x, out.feature_acts, out.sae_out)


def v2(root: Path) -> None:
    """Version 2."""
    _runner(root, "v2_standard", torch.ones(F))
    _runner(root, "v2_finetuned", torch.linspace(0.5, 1.5, F), apply_b_dec_to_input=False, prepend_bos=False)
    _legacy_pickle(root)


def _legacy_pickle(root: Path) -> None:
    """The pickle that versions 0.2 to 2 could still write."""
    import sae_lens
    from sae_lens.training.config import LanguageModelSAERunnerConfig
    from sae_lens.training.sparse_autoencoder import SparseAutoencoder

    sae = fill(SparseAutoencoder(LanguageModelSAERunnerConfig(**(RUNNER | {"verbose": False}))))
    folder = place(root, "v2_pickle")
    sae.save_model_legacy(str(folder / "final_sparse_autoencoder.pt"))
    x = inputs()
    with torch.no_grad():
        out = sae(x)
    record(folder, "sae-lens", sae_lens.__version__, x, out.feature_acts, out.sae_out)


def v0(root: Path) -> None:
    """Version 0.5."""
    _runner(root, "v0_standard", torch.ones(F), apply_b_dec_to_input=False, hook_point_head_index=2)


# mats_sae_training


def mats(root: Path) -> None:
    """One coder: a pickle of `{"cfg", "state_dict"}`, with torch.save and gzipped."""
    from sae_training.config import LanguageModelSAERunnerConfig
    from sae_training.sparse_autoencoder import SparseAutoencoder

    runner = RUNNER | {"feature_sampling_method": None, "use_ghost_grads": False}
    cfg: Any = LanguageModelSAERunnerConfig(**runner)
    sae = fill(SparseAutoencoder(cfg))
    x = inputs()
    with torch.no_grad():
        recon, acts, *_ = sae(x)
    for name, suffix in (("mats_pt", ".pt"), ("mats_gz", ".pkl.gz")):
        folder = place(root, name)
        file = f"final_{sae.get_name()}"
        sae.save_model(str(folder / (file + suffix)))
        torch.save(torch.linspace(-10, -1, F), folder / f"{file}_log_feature_sparsity.pt")
        record(folder, "mats_sae_training", "f554b161", x, acts, recon)


def mats_group(root: Path) -> None:
    """Two coders of one group object, over layers 1 and 2."""
    from sae_training.config import LanguageModelSAERunnerConfig
    from sae_training.sae_group import SAEGroup

    layers = {"hook_point": "blocks.{layer}.hook_resid_pre", "hook_point_layer": [1, 2]}
    group = SAEGroup(LanguageModelSAERunnerConfig(**(RUNNER | layers)))
    x, told = inputs(), {}
    for i, sae in enumerate(group):
        fill(sae, -0.4 - 0.2 * i)
        with torch.no_grad():
            out = sae(x)
        recon, acts = (out.sae_out, out.feature_acts) if hasattr(out, "sae_out") else (out[0], out[1])
        told |= {f"{i}.acts": acts, f"{i}.recon": recon}
    for name, suffix in (("mats_group_pt", ".pt"), ("mats_group_gz", ".pkl.gz")):
        folder = place(root, name)
        group.save_model(str(folder / f"final_sae_group_gpt2-small{suffix}"))
        sparsities = [torch.linspace(-10, -1, F), torch.linspace(-9, -2, F)]
        torch.save(sparsities, folder / "final_sae_group_gpt2-small_log_feature_sparsity.pt")
        first = {key: told[f"0.{key}"].clone() for key in ("acts", "recon")}
        record(folder, "mats_sae_training", "693c5b33", x, first["acts"], first["recon"], **told)


GENERATIONS = {"v5": v5, "v4": v4, "v3": v3, "v2": v2, "v0": v0, "mats": mats, "mats_group": mats_group}

if __name__ == "__main__":
    import wandb

    wandb.util.generate_id = lambda: "abcd1234"  # moved since; the old configs call it for a folder's name
    GENERATIONS[sys.argv[2]](Path(sys.argv[1]))
