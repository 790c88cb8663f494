"""Record the first 20 training steps of other trainers: `python tests/parity/make_training_steps.py PEER`.

Not a test and never run by one. PEER is `sae_lens` (6.54.12), `dictionary_learning` (0.1.0) or `e2e_sae` (2.1.1), run
by an interpreter that has it, with torch 2.13.0. Their own trainers take the steps, in float64, each on the same rows;
of e2e_sae its coder and its loss take part, around a model of two matrices, with the optimiser that its script makes.

`training_steps/rows.safetensors` holds the rows `x [20, 32, 8]` and the two matrices. Each `KIND.safetensors` holds the
weights before the first step and after steps 1, 5 and 20 (`N.name`, in our names and latent-major) and the 20 losses.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from recording import stub
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent / "training_steps"
D, F, ROWS, STEPS, K, LR = 8, 24, 32, 20, 4, 3e-3
KEPT = (1, 5, 20)
torch.set_default_dtype(torch.float64)


def rows() -> dict[str, Tensor]:
    """Sparse sums of hidden directions with a mean of their own, made once."""
    path = HERE / "rows.safetensors"
    if not path.is_file():
        rng = torch.Generator().manual_seed(4)
        atoms = nn.functional.normalize(torch.randn(16, D, generator=rng), dim=-1)
        strength = torch.rand(STEPS * ROWS, 16, generator=rng)
        x = (strength * (strength > 0.8)) @ atoms * 3 + 0.3 + 0.05 * torch.randn(STEPS * ROWS, D, generator=rng)
        later, head = (torch.randn(D, width, generator=rng) / D**0.5 for width in (D, 11))
        HERE.mkdir(exist_ok=True)
        save_file({"x": x.view(STEPS, ROWS, D).float(), "later": later.float(), "head": head.float()}, path)
    return {name: t.double() for name, t in load_file(path).items()}


def first_weights(names: dict[str, tuple[int, ...]], unit: bool) -> dict[str, Tensor]:
    """Random weights; decoder rows of norm 1, or of different norms."""
    rng = torch.Generator().manual_seed(7)
    found = {
        name: torch.randn(shape, generator=rng) * (0.1 if len(shape) == 1 else D**-0.5) for name, shape in names.items()
    }
    if unit:
        found["W_dec"] = nn.functional.normalize(found["W_dec"], dim=-1)
    return found


def record(kind: str, peer: str, version: str, said: dict[str, object], step: Callable[[int], float],
           weights: Callable[[], dict[str, Tensor]]) -> None:  # fmt: skip
    """Take the steps and keep what they did."""
    kept = {f"0.{name}": t.detach().clone() for name, t in weights().items()}
    losses: list[float] = []
    for n in range(1, STEPS + 1):
        losses.append(step(n - 1))
        if n in KEPT:
            kept |= {f"{n}.{name}": t.detach().clone() for name, t in weights().items()}
    kept["losses"] = torch.tensor(losses)
    save_file({name: t.contiguous() for name, t in kept.items()}, HERE / f"{kind}.safetensors")
    facts = {"peer": peer, "version": version, "torch": torch.__version__.split("+")[0], "lr": LR, **said}
    (HERE / f"{kind}.json").write_text(json.dumps(facts, indent=1) + "\n")


def sae_lens() -> None:
    """TopK with and without norms in the selection, JumpReLU with its three penalties."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x = rows()["x"]
    common = {"d_in": D, "d_sae": F, "dtype": "float64", "device": "cpu", "normalize_activations": "none"}
    jump = {"jumprelu_init_threshold": 0.3, "jumprelu_bandwidth": 0.4, "l0_coefficient": 0.05}
    made = {
        "sae_lens_topk": lambda: TopKTrainingSAE(
            TopKTrainingSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=True)
        ),
        "sae_lens_topk_norms": lambda: TopKTrainingSAE(
            TopKTrainingSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
        ),
        **{
            f"sae_lens_jumprelu_{mode}": lambda mode=mode: JumpReLUTrainingSAE(
                JumpReLUTrainingSAEConfig(
                    **common,
                    **jump,
                    apply_b_dec_to_input=False,
                    jumprelu_sparsity_loss_mode=mode,
                    target_l0=5.0 if mode == "quadratic" else None,
                )
            )
            for mode in ("step", "tanh", "quadratic")
        },
    }
    for kind, make in made.items():
        sae = make()
        sae.double()
        if "jumprelu" in kind:
            sae.threshold = nn.Parameter(sae.threshold.detach().double())  # it would stay float32
        shapes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
        with torch.no_grad():
            for name, value in first_weights(shapes, unit=False).items():
                getattr(sae, name).copy_(value.T if name == "W_enc" else value)
        config = SAETrainerConfig(total_training_samples=STEPS * ROWS, train_batch_size_samples=ROWS, lr=LR, lr_end=LR)
        trainer = SAETrainer(config, sae, iter(x))

        def step(n: int, trainer: SAETrainer = trainer) -> float:
            found = trainer.step(x[n]).loss.item()
            trainer.n_training_steps += 1
            return found

        def weights(sae: nn.Module = sae) -> dict[str, Tensor]:
            state = sae.state_dict()
            return {name: t.T if name == "W_enc" else t for name, t in state.items()}

        record(kind, "sae_lens", "6.54.12", {}, step, weights)


def dictionary_learning() -> None:
    """BatchTopK and Gated."""
    site = Path(importlib.util.find_spec("dictionary_learning").origin).parent
    stub("dictionary_learning", site)
    stub("dictionary_learning.trainers", site / "trainers")
    stub("dictionary_learning.config", DEBUG=False)
    stub("nnsight", LanguageModel=object)
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    x = rows()["x"]
    common = {
        "steps": 1000,
        "activation_dim": D,
        "dict_size": F,
        "layer": 0,
        "lm_name": "none",
        "lr": LR,
        "device": "cpu",
    }
    shapes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    made = {
        "dictionary_learning_batchtopk": (
            BatchTopKTrainer(**common, k=K, warmup_steps=0, threshold_start_step=0),
            {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "b_dec": "b_dec"},
            shapes,
        ),
        "dictionary_learning_gated": (
            GatedSAETrainer(**common, l1_penalty=0.1, warmup_steps=0, sparsity_warmup_steps=None),
            {"encoder.weight": "W_enc", "gate_bias": "b_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec",
             "r_mag": "r_mag", "mag_bias": "b_mag"},
            shapes | {"r_mag": (F,), "b_mag": (F,)},
        ),
    }  # fmt: skip
    for kind, (trainer, names, shape) in made.items():
        start = first_weights(shape, unit=True)
        parameters = dict(trainer.ae.named_parameters())
        for theirs, ours in names.items():
            parameters[theirs].data = start[ours].T.contiguous() if ours == "W_dec" else start[ours].clone()

        def step(n: int, trainer: object = trainer) -> float:
            # Its step 0 would set b_dec from the first batch: steps are counted from 1.
            if isinstance(trainer, BatchTopKTrainer):
                return trainer.update(n + 1, x[n])
            loss = trainer.loss(x[n], step=n + 1).item()
            trainer.update(n + 1, x[n])
            return loss

        def weights(trainer: object = trainer, names: dict[str, str] = names) -> dict[str, Tensor]:
            now = dict(trainer.ae.named_parameters())
            found = {ours: now[theirs].T if ours == "W_dec" else now[theirs] for theirs, ours in names.items()}
            threshold = getattr(trainer.ae, "threshold", None)
            return found if threshold is None else found | {"threshold": threshold.double()}

        record(kind, "dictionary_learning", "0.1.0", {}, step, weights)


def e2e_sae() -> None:
    """Its coder and loss: sparsity, local error, KL at the logits and error at a later place."""
    site = Path(importlib.util.find_spec("e2e_sae").origin).parent
    stub("e2e_sae", site)
    stub("e2e_sae.models", site / "models")
    stub("transformer_lens")
    stub("transformer_lens.hook_points", HookPoint=object)
    from e2e_sae.hooks import CacheActs, SAEActs
    from e2e_sae.losses import LossConfigs, calc_loss
    from e2e_sae.models.sparsifiers import SAE

    data = rows()
    sae = SAE(D, F)
    start = first_weights({"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}, unit=True)
    theirs = {
        "encoder.0.weight": "W_enc",
        "encoder.0.bias": "b_enc",
        "decoder.weight": "W_dec",
        "decoder.bias": "b_dec",
    }
    parameters = dict(sae.named_parameters())
    for name, ours in theirs.items():
        parameters[name].data = start[ours].T.contiguous() if ours == "W_dec" else start[ours].clone()
    coefficients = {
        "sparsity": {"p_norm": 1.0, "coeff": 1.5}, "in_to_orig": {"total_coeff": 2.5, "hook_positions": ["later"]},
        "out_to_orig": None, "out_to_in": {"coeff": 1.0}, "logits_kl": {"coeff": 0.5},
    }  # fmt: skip
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(n: int) -> float:
        x = data["x"][n][None]
        later = torch.tanh(x @ data["later"])
        output, c = sae(x)
        new_later = torch.tanh(output @ data["later"])
        loss, _ = calc_loss(
            {"here": x, "later": later}, {"here": SAEActs(x, c, output), "later": CacheActs(new_later)},
            later @ data["head"], new_later @ data["head"], LossConfigs(**coefficients),
        )  # fmt: skip
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        return loss.item()

    def weights() -> dict[str, Tensor]:
        return {ours: parameters[name].T if ours == "W_dec" else parameters[name] for name, ours in theirs.items()}

    record("e2e_sae", "e2e_sae", "2.1.1", {"coefficients": coefficients}, step, weights)


if __name__ == "__main__":
    {"sae_lens": sae_lens, "dictionary_learning": dictionary_learning, "e2e_sae": e2e_sae}[sys.argv[1]]()
