"""Write `sae_lens/<kind>/` with SAELens 6 itself: its checkpoints, and what it computes from them.

Not a test and never run by one: it needs the peer. In an environment with `sae-lens==6.54.12` and `torch==2.13.0`:

    python tests/parity/make_sae_lens.py tests/parity/sae_lens

Each folder holds the peer's files, `expected.safetensors` (inputs `x`, dense codes `acts`, decoded `recon`, extras by
kind) and `recorded.json` (what wrote it). Weights are random, chosen so that every gate is exercised: thresholds above
zero, decoder rows of different norms, biases away from zero, top-k rows with fewer than k positive candidates.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file
from torch import Tensor

D, F, OUT, ROWS = 16, 48, 12, 8
TRAINED = {
    "model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre", "hook_head_index": None, "context_size": 64,
    "prepend_bos": True, "seqpos_slice": [None], "model_from_pretrained_kwargs": {}, "dataset_path": "some/dataset",
}  # fmt: skip
WRITTEN: dict[str, Callable[[Path], None]] = {}


def kind(function: Callable[[Path], None]) -> Callable[[Path], None]:
    WRITTEN[function.__name__] = function
    return function


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(*shape: int) -> Tensor:
    x = torch.randn(*(shape or (ROWS, D)), generator=generator(1)) * 2
    x.view(-1, x.shape[-1])[0] *= 0.01  # biases alone decide this row
    return x


def fill(sae: Any, shift: float = -0.4) -> Any:
    """Random parameters; those that gate are shifted so that each row fires some latents and not others."""
    rng = generator(2)
    for name, p in sorted(sae.named_parameters()):
        value = torch.randn(p.shape, generator=rng)
        if name == "W_enc":
            value = value / D**0.5
        elif name == "W_dec":
            # Matching pursuit overshoots where an atom is longer than √2.
            ends = (0.7, 1.3) if sae.cfg.architecture() == "matching_pursuit" else (0.5, 2.0)
            value = torch.nn.functional.normalize(value, dim=-1) * torch.linspace(*ends, len(p))[:, None]
        elif "threshold" in name:
            value = value.abs() * 0.4 + 0.1
        elif name in ("b_enc", "b_gate", "b_mag"):
            value = value * 0.3 + shift
        elif name == "r_mag":
            value = value * 0.3
        elif "attn_layers" in name:
            value = value / p.shape[-1] ** 0.5
        else:
            value = value * 0.5
        p.data.copy_(value)
    return sae.eval()


def make(architecture: str, cls: Any = SAE, **cfg: Any) -> Any:
    metadata = {**TRAINED, **cfg.pop("metadata", {})}
    tree = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", **cfg}
    config = cls.get_sae_config_class_for_architecture(architecture)
    if cls is SAE:
        config = sae_lens.registry.get_sae_class(architecture)[1]
    made = cls.get_sae_class_for_architecture(architecture)(config.from_dict(tree))
    made.cfg.metadata = SAEMetadata(**{**made.cfg.metadata.to_dict(), **metadata})
    return fill(made)


def record(folder: Path, x: Tensor, acts: Tensor, recon: Tensor, **extra: Tensor) -> None:
    tensors = {"x": x, "acts": acts, "recon": recon, **extra}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    told = {
        "peer": "sae-lens", "version": sae_lens.__version__, "torch": torch.__version__, "own_code": True,
        "command": "python tests/parity/make_sae_lens.py tests/parity/sae_lens",
    }  # fmt: skip
    (folder / "recorded.json").write_text(json.dumps(told, indent=1) + "\n")


@torch.no_grad()
def run(folder: Path, sae: Any, x: Tensor | None = None, **extra: Tensor) -> None:
    """Save, load again with the peer's own loader, and record what the loaded one computes."""
    sae.save_model(folder)
    loaded = type(sae).load_from_disk(folder).eval()
    x = inputs() if x is None else x
    acts = loaded.encode(x)
    recon = loaded.decode(acts)
    if hasattr(loaded, "W_skip"):
        extra["forward"] = loaded(x)
    record(folder, x, acts, recon, **extra)


@kind
def standard(folder: Path) -> None:
    run(folder, make("standard"))
    frequency = torch.linspace(0, 0.5, F)
    save_file({"sparsity": torch.log10(frequency + 1e-10)}, folder / "sparsity.safetensors")
    (folder / "runner_cfg.json").write_text(json.dumps({"lr": 3e-4, "training_tokens": 1000, "seed": 42}))


@kind
def standard_layer_norm(folder: Path) -> None:
    run(folder, make("standard", normalize_activations="layer_norm"))


@kind
def standard_constant_norm(folder: Path) -> None:
    run(folder, make("standard", normalize_activations="constant_norm_rescale", apply_b_dec_to_input=False))


@kind
def standard_hook_z(folder: Path) -> None:
    sae = make("standard", reshape_activations="hook_z", metadata={"hook_name": "blocks.1.attn.hook_z"})
    sae.save_model(folder)
    loaded = SAE.load_from_disk(folder)
    x = inputs(ROWS, 4, D // 4)
    with torch.no_grad():
        acts = loaded.encode(x)
        recon = loaded.decode(acts)
    assert recon.shape == x.shape
    record(folder, x.flatten(1), acts, recon.flatten(1))


@kind
def gated(folder: Path) -> None:
    run(folder, make("gated"))


@kind
def gated_constant_norm(folder: Path) -> None:
    run(folder, make("gated", normalize_activations="constant_norm_rescale"))


@kind
def jumprelu(folder: Path) -> None:
    run(folder, make("jumprelu", apply_b_dec_to_input=False))


@kind
def jumprelu_log_threshold(folder: Path) -> None:
    """A checkpoint of before the threshold itself was the parameter; the peer takes exp on load."""
    sae = make("jumprelu", TrainingSAE)
    sae.save_model(folder)
    state = {k: v.detach().clone() for k, v in sae.state_dict().items()}
    state["log_threshold"] = state.pop("threshold").log()
    save_file(state, folder / "sae_weights.safetensors")
    loaded, x = TrainingSAE.load_from_disk(folder).eval(), inputs()
    with torch.no_grad():
        acts = loaded.encode(x)
        record(folder, x, acts, loaded.decode(acts))


@kind
def topk(folder: Path) -> None:
    run(folder, few_positive(make("topk", k=6)))


@kind
def topk_rescaled(folder: Path) -> None:
    run(folder, few_positive(make("topk", k=6, rescale_acts_by_decoder_norm=True)))


@kind
def topk_training(folder: Path) -> None:
    run(folder, few_positive(make("topk", TrainingSAE, k=6)))


def few_positive(sae: Any) -> Any:
    """Some rows have fewer than k positive pre-activations."""
    sae.b_enc.data -= 1.2
    return sae


@kind
def abstopk(folder: Path) -> None:
    run(folder, make("abstopk", k=5, normalize_activations="layer_norm"))


@kind
def abstopk_rescaled(folder: Path) -> None:
    run(folder, make("abstopk", k=5, rescale_acts_by_decoder_norm=True))


@torch.no_grad()
def batch(folder: Path, sae: Any) -> None:
    """Codes chosen over the batch, and those of the peer's inference export (a threshold)."""
    sae.topk_threshold.fill_(1.1)
    sae.save_model(folder)
    loaded, x = TrainingSAE.load_from_disk(folder).eval(), inputs()
    acts = loaded.encode(x)
    recon = loaded.decode(acts)
    exported = folder / "exported"
    loaded.save_inference_model(exported)
    inference = SAE.load_from_disk(exported).eval()
    for file in exported.iterdir():
        file.unlink()
    exported.rmdir()
    codes = inference.encode(x)
    record(folder, x, acts, recon, inference_acts=codes, inference_recon=inference.decode(codes))


@kind
def batchtopk_training(folder: Path) -> None:
    batch(folder, make("batchtopk", TrainingSAE, k=4.0))


@kind
def batchtopk_training_raw(folder: Path) -> None:
    batch(folder, make("batchtopk", TrainingSAE, k=4.0, rescale_acts_by_decoder_norm=False))


@kind
def matryoshka_batchtopk_training(folder: Path) -> None:
    batch(folder, make("matryoshka_batchtopk", TrainingSAE, k=4.0, matryoshka_widths=[16, 48]))


@kind
@torch.no_grad()
def batchtopk_inference(folder: Path) -> None:
    sae = make("batchtopk", TrainingSAE, k=4.0)
    sae.topk_threshold.fill_(1.1)
    sae.save_inference_model(folder)
    loaded, x = SAE.load_from_disk(folder).eval(), inputs()
    acts = loaded.encode(x)
    record(folder, x, acts, loaded.decode(acts))


def transcode(folder: Path, architecture: str, **cfg: Any) -> None:
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    run(folder, make(architecture, d_out=OUT, apply_b_dec_to_input=False, metadata=hooks, **cfg))


@kind
def transcoder(folder: Path) -> None:
    transcode(folder, "transcoder")


@kind
def skip_transcoder(folder: Path) -> None:
    transcode(folder, "skip_transcoder")


@kind
def jumprelu_transcoder(folder: Path) -> None:
    transcode(folder, "jumprelu_transcoder")


@kind
def jumprelu_skip_transcoder(folder: Path) -> None:
    transcode(folder, "jumprelu_skip_transcoder")


@kind
def transcoder_layer_norm(folder: Path) -> None:
    transcode(folder, "transcoder", normalize_activations="layer_norm")


@kind
def matching_pursuit(folder: Path) -> None:
    run(folder, make("matching_pursuit", residual_threshold=1.5))


@kind
def matching_pursuit_no_bias(folder: Path) -> None:
    run(folder, make(
        "matching_pursuit", residual_threshold=0.0, max_iterations=7, stop_on_duplicate_support=False,
        apply_b_dec_to_input=False, normalize_activations="layer_norm",
    ))  # fmt: skip


def in_sequence(folder: Path, **cfg: Any) -> None:
    sae = make("temporal", d_sae=32, n_heads=2, bottleneck_factor=4, **cfg)
    sae.save_model(folder)
    loaded, x = SAE.load_from_disk(folder).eval(), inputs(2, 5, D)
    with torch.no_grad():
        novel, predicted = loaded.encode_with_predictions(x)
        record(folder, x, novel, loaded.decode(novel), predicted=predicted, forward=loaded(x))


@kind
def temporal(folder: Path) -> None:
    in_sequence(folder, kval_topk=4)


@kind
def temporal_untied(folder: Path) -> None:
    in_sequence(
        folder, sae_diff_type="relu", tied_weights=False, n_attn_layers=2, apply_b_dec_to_input=False,
        normalize_activations="constant_scalar_rescale", activation_normalization_factor=0.7,
    )  # fmt: skip


@kind
def temporal_tied_no_bias(folder: Path) -> None:
    in_sequence(folder, sae_diff_type="relu", apply_b_dec_to_input=False)


@torch.no_grad()
def checkpoint(folder: Path, sae: Any, scaler: ActivationScaler) -> None:
    """A training checkpoint, whose statistics lie beside the weights: the peer's trainer applies them around it."""
    sae.save_model(folder)
    scaler.save(str(folder / "activation_scaler.json"))
    again = ActivationScaler()
    again.load(folder / "activation_scaler.json")
    loaded, x = TrainingSAE.load_from_disk(folder).eval(), inputs()
    acts = loaded.encode(again.scale(x))
    record(folder, x, acts, again.unscale(loaded.decode(acts)))


def whitening() -> ActivationScaler:
    scaler, rng = ActivationScaler(), generator(5)
    mixing = torch.randn(D, D, generator=rng) / D**0.5 + torch.eye(D)
    data = iter([torch.randn(512, D, generator=rng) @ mixing + 0.5])
    scaler.estimate_whitening(D, data, n_batches_for_norm_estimate=1)
    return scaler


@kind
def checkpoint_scaled(folder: Path) -> None:
    sae = make("standard", TrainingSAE, normalize_activations="expected_average_only_in")
    checkpoint(folder, sae, ActivationScaler(scaling_factor=0.6))


@kind
def checkpoint_scaled_topk(folder: Path) -> None:
    sae = make("topk", TrainingSAE, k=6, normalize_activations="expected_average_only_in")
    checkpoint(folder, few_positive(sae), ActivationScaler(scaling_factor=0.6))


@kind
def checkpoint_scaled_matching_pursuit(folder: Path) -> None:
    cfg = {"normalize_activations": "expected_average_only_in", "residual_threshold": 0.9, "decoder_init_norm": 1.0}
    checkpoint(folder, make("matching_pursuit", TrainingSAE, **cfg), ActivationScaler(scaling_factor=0.6))


@kind
def checkpoint_whitened(folder: Path) -> None:
    sae = make("standard", TrainingSAE, normalize_activations="covariance_whitening", apply_b_dec_to_input=False)
    checkpoint(folder, sae, whitening())


@kind
def checkpoint_whitened_gated(folder: Path) -> None:
    sae = make("gated", TrainingSAE, normalize_activations="covariance_whitening", apply_b_dec_to_input=False)
    checkpoint(folder, sae, whitening())


@kind
def checkpoint_whitened_topk(folder: Path) -> None:
    checkpoint(folder, make("topk", TrainingSAE, k=6, normalize_activations="covariance_whitening"), whitening())


if __name__ == "__main__":
    root = Path(sys.argv[1])
    chosen = sys.argv[2:] or list(WRITTEN)
    for name in chosen:
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        WRITTEN[name](place)
        size = sum(f.stat().st_size for f in place.iterdir())
        sys.stderr.write(f"{name}: {size} bytes\n")
