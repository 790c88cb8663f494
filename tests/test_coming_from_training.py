"""Every run file of docs/coming-from.md trains, shrunk, and its coder goes back into the other project's layout."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lm.families import raw_model
from test_docs import has_field
from unmix.core.config import build
from unmix.run.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
CONTEXT = 32
FAMILIES = {
    "gpt2": ("gpt2", {"n_layer": 11}),
    "meta-llama/Llama-3.1-8B": ("llama", {"num_hidden_layers": 4}),
    "EleutherAI/pythia-160m": ("gpt_neox", {"num_hidden_layers": 8}),
}
"""Models that the run files name → what stands for them: as many layers as the hooks need, width 16."""
FORMATS = {
    "mats_sae_training and SAELens": "sae_lens", "OpenAI sparse_autoencoder": "openai", "OpenSAE": "opensae",
    "e2e_sae": "e2e_sae", "sae-auto-interp (delphi) and sparsify": "sparsify",
}  # fmt: skip
TERMS = {
    "mats_sae_training and SAELens": {"mse", "auxk", "l1"}, "OpenAI sparse_autoencoder": {"mse", "auxk"},
    "OpenSAE": {"mse", "auxk", "multi_topk"}, "e2e_sae": {"kl", "downstream", "l1"},
    "sae-auto-interp (delphi) and sparsify": {"mse", "multi_topk"},
}  # fmt: skip
OPTIONS = {
    # Of sae_lens' docs/training_saes.md and its config of that time.
    "mats_sae_training and SAELens": """model_name hook_name dataset_path hook_layer d_in expansion_factor
        l1_coefficient training_tokens train_batch_size_tokens is_dataset_tokenized streaming mse_loss_normalization
        b_dec_init_method apply_b_dec_to_input normalize_sae_decoder scale_sparsity_penalty_by_decoder_norm
        decoder_heuristic_init init_encoder_as_decoder_transpose normalize_activations lr adam_beta1 adam_beta2
        lr_scheduler_name lr_warm_up_steps lr_decay_steps l1_warm_up_steps lp_norm context_size n_batches_in_buffer
        store_batch_size_prompts use_ghost_grads feature_sampling_window dead_feature_window dead_feature_threshold
        log_to_wandb wandb_project wandb_log_frequency eval_every_n_wandb_logs device seed n_checkpoints
        checkpoint_path dtype use_cached_activations cached_activations_path begin_batch_token begin_sequence_token
        sequence_separator_token architecture activation_fn d_sae prepend_bos from_pretrained_path finetuning_tokens
        noise_scale decoder_orthogonal_init resume n_eval_batches autocast compile_sae hook_head_index""",
    # Of its train.py, which its README points to.
    "OpenAI sparse_autoencoder": """n_op_shards n_replicas n_dirs bs d_model k auxk lr eps clip_grad auxk_coef
        dead_toks_threshold ema_multiplier wandb_project wandb_name""",
    # Of examples/train.sh, which its README points to, and the fields of its arguments.
    "OpenSAE": """model auto_model_class trust_remote_code dataset split ctx_len hookpoint mp_size dp_size fsdp
        adam_in_8bit local_batch_size global_batch_size micro_acc_steps distribute_modules save_every save_dir
        load_dir dead_feature_threshold multi_topk k_scheduler k_scheduler_step_ratio auxk_alpha lr_scheduler_type
        lr_warmup_ratio lr_decay_ratio spike_detection varlen early_exit_inference_layer_num log_to_wandb
        wandb_project expansion_factor k normalize shift_back run_name num_latents l1_coef normalize_decoder
        grad_acc_steps min_lr_ratio save_at_init load_in_8bit seed""",
    # Of its configs in scripts/train_tlens_saes, which its README points to.
    "e2e_sae": """tlens_model_name tlens_model_path n_samples save_every_n_samples eval_every_n_samples
        eval_n_samples log_every_n_grad_steps collect_act_frequency_every_n_samples act_frequency_n_tokens
        batch_size effective_batch_size lr lr_schedule min_lr_factor warmup_samples cooldown_samples max_grad_norm
        sparsity in_to_orig out_to_orig out_to_in logits_kl dataset_name is_tokenized tokenizer_name streaming split
        n_ctx column_name eval_data retrain_saes pretrained_sae_paths sae_positions dict_size_to_input_ratio
        wandb_project wandb_run_name wandb_run_name_prefix seed save_dir""",
    # Of its README, and `python -m sparsify --help`.
    "sae-auto-interp (delphi) and sparsify": """data_args finetune hookpoints expansion_factor num_latents
        distribute_modules batch_size layers k grad_acc_steps ctx_len layer_stride load_in_8bit micro_acc_steps
        k_decay_steps activation loss_fn transcode skip_connection multi_topk normalize_decoder optimizer lr
        lr_warmup_steps auxk_alpha dead_feature_threshold exclude_tokens init_seeds save_every save_best
        log_to_wandb run_name wandb_log_frequency save_dir split hf_token revision max_examples resume text_column
        shuffle_seed data_preprocessing_num_proc""",
}


@dataclass(frozen=True)
class Section:
    """A project's part of the page."""

    name: str
    text: str

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, flags=re.MULTILINE | re.DOTALL)

    def run_files(self) -> list[dict[str, Any]]:
        return [yaml.safe_load(block) for block in self.blocks("yaml") if re.search(r"^model:", block, re.MULTILINE)]


SECTIONS = [Section(part.split("\n", 1)[0], part) for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]]
RUNS = [(section.name, i) for section in SECTIONS for i in range(len(section.run_files()))]


def section(name: str) -> Section:
    return next(found for found in SECTIONS if found.name == name)


@pytest.fixture(scope="module")
def models(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each model that the page names."""
    from transformers import AutoTokenizer

    found: dict[str, Path] = {}
    for name, (family, layers) in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp(family)
        raw_model(family, vocab_size=512, **layers).save_pretrained(found[name])
        AutoTokenizer.from_pretrained(tiny_tokenizer_folder).save_pretrained(found[name])
    return found


@pytest.fixture
def source(tmp_path: Path, prose: list[str]) -> Any:
    """Something to read for what a run file names, with the columns that it names."""

    def make(data: dict[str, Any]) -> str:
        if not str(data["source"]).startswith("hf:"):
            (block,) = [block for block in section("OpenSAE").blocks("python") if "np.memmap" in block]
            np.random.default_rng(0).integers(2, 512, 60 * 4096 + 17).astype(np.int32).tofile(tmp_path / "1b.mmap")
            exec(compile(block, "docs/coming-from.md", "exec"), {})
            assert (tmp_path / str(data["source"])).is_file()
            return str(data["source"])
        path = tmp_path / "data.jsonl"
        ids = np.random.default_rng(0).integers(2, 512, (300, CONTEXT)).tolist()
        values = ids if data.get("tokenised") else prose
        column = data.get("column", "input_ids" if data.get("tokenised") else "text")
        path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
        return str(path)

    return make


def shrunk(tree: dict[str, Any], folder: Path, source: str) -> dict[str, Any]:
    """Fewer tokens and latents on a tiny model; every other field as it stands."""
    tree["model"] = {**tree["model"], "name": str(folder), "dtype": "float32"}
    tree["data"] |= {"source": source, "tokens": 3000, "context": CONTEXT}
    for coder in tree.get("coders", {"": tree.get("coder")}).values():
        coder.pop("expansion", None)
        coder |= {"n_latents": 64, **({"k": 4} if "k" in coder else {})}
    tree["train"] |= {"batch": 256, "init_rows": 256, "log_every": 1, "trackers": []}
    if "k_aux" in tree["train"]:
        tree["train"]["k_aux"] = 8
    return tree


@pytest.mark.parametrize(("name", "which"), RUNS, ids=[f"{name} {i}" for name, i in RUNS])
def test_a_run_file_trains_and_its_coder_goes_back(
    name: str, which: int, models: dict[str, Path], source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terms that it names act, and what is written back reconstructs the same."""
    import unmix

    monkeypatch.chdir(tmp_path)
    tree = section(name).run_files()[which]
    build(RunConfig, tree, source=name)
    tree = shrunk(tree, models[tree["model"]["name"]], source(tree["data"]))
    Path("run.yaml").write_text(yaml.safe_dump({**tree, "out": "run"}))
    context = unmix.train("run.yaml")
    asked = tree.get("coders") or {"": tree["coder"]}
    assert len(context.coders) == len(asked)
    for log in Path("run").rglob("metrics.jsonl"):
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        terms = {key.removeprefix("loss/") for key in last if key.startswith("loss/")}
        assert terms == (TERMS[name] if "objective" in tree["train"] or which == 0 else {"mse", "auxk"})
    for at, spec in zip(context.coders, asked.values(), strict=True):
        coder = context.coders[at]
        assert coder.config.activation.kind == spec.get("activation", "topk")
        folder = next(path for path in Path("run/coders").iterdir() if path.name == at)
        unmix.convert(folder, f"back-{at}", FORMATS[name])
        back = unmix.load(f"back-{at}")
        assert back.config.training["source"]["format"] == FORMATS[name]
        x = torch.randn(9, coder.config.d_in) * 3
        assert torch.allclose(back(x).reconstruction, coder(x).reconstruction, atol=1e-5, rtol=1e-4)


def test_training_goes_on_from_their_coder(
    models: dict[str, Path], source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sparsify's `--finetune`: one of its own recorded coders begins a run of its section."""
    import unmix

    monkeypatch.chdir(tmp_path)
    theirs = ROOT / "tests" / "parity" / "sparsify" / "topk" / "layers.10"
    begin = unmix.load(theirs)
    tree = section("sae-auto-interp (delphi) and sparsify").run_files()[0]
    tree = shrunk(tree, models[tree["model"]["name"]], source(tree["data"]))
    tree["coders"] = {"three": {"hook": "layers.3", "n_latents": begin.config.n_latents, "k": 4}}
    tree["coders"]["three"]["train"] = {"start_from": str(theirs), "lr": 1e-9, "unit_norm": False}
    Path("run.yaml").write_text(yaml.safe_dump({**tree, "out": "run"}))
    (trained,) = unmix.train("run.yaml").coders.values()
    assert torch.allclose(trained.W_enc, begin.W_enc, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_table_has_every_option(name: str) -> None:
    """Of their documents; what is not there is said."""
    named = " ".join(line for line in section(name).text.splitlines() if line.startswith("| "))
    missing = [option for option in OPTIONS[name].split() if not re.search(rf"(?<![a-z]){option}", named)]
    assert missing == []


def test_fields_in_the_tables_exist() -> None:
    """Whatever looks like a field of a run file is one."""
    rows = [line.rsplit("|", 2)[1] for line in TEXT.splitlines() if line.startswith("| ")]
    sections = "model|data|coder|capture|train|parallel|evaluate"
    named = set(re.findall(rf"`((?:{sections})\.[a-z_.]+)", " ".join(rows)))
    assert len(named) > 40
    assert [field for field in sorted(named) if not has_field(field)] == []


def test_every_project_that_trains_has_its_run_file() -> None:
    assert {name for name, _ in RUNS} == set(FORMATS) == set(OPTIONS)
