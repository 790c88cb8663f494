"""The evaluator against perfect, silent and hand-made coders, and against a plain recomputation."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unmix.coder.config import CoderConfig, ReLU, TopK
from unmix.coder.identity import IdentityCoder
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, DataError, ModelError, NonFiniteError
from unmix.core.policy import InputPolicy
from unmix.evaluate import Evaluation, evaluate
from unmix.lm.model import LanguageModel

HOOK = "blocks.0.resid_post"
POLICY = InputPolicy(bos="none", skip_first=1)


def llama(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    } | changes  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, rms_norm_eps=1e-6)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # the default 0.02 leaves every prediction flat
    return model


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return LanguageModel(llama(), "tiny-llama")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 31, (6, 12), generator=torch.Generator().manual_seed(1))


def with_policy(coder: SparseCoder, policy: InputPolicy = POLICY) -> SparseCoder:
    coder.config = coder.config.model_copy(update={"input_policy": policy})
    return coder


def perfect(hook: str = HOOK, width: int = 16) -> SparseCoder:
    return with_policy(IdentityCoder(hook, width)).eval()


def silent(hook: str = HOOK, width: int = 16) -> SparseCoder:
    """Always reconstructs 0."""
    config = CoderConfig(reads=(hook,), d_in=width, n_latents=8, activation=ReLU(), pre_bias="none")
    coder = with_policy(SparseCoder(config)).eval()
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    return coder


def lossy(hook: str = HOOK, width: int = 16) -> SparseCoder:
    config = CoderConfig(reads=(hook,), d_in=width, n_latents=64, activation=TopK(k=4), pre_bias="none")
    return with_policy(SparseCoder(config, seed=3)).eval()


def numbers(result: Evaluation) -> dict[str, float]:
    """Values and bounds, flat; -1 stands for None."""
    return {f"{name} {part}": -1.0 if x is None else x for name, metric in result.items() for part, x in metric.items()}


def test_perfect_coder_changes_nothing(lm, tokens):
    result = evaluate(perfect(), lm, tokens)
    assert result.value("fvu") == pytest.approx(0.0, abs=1e-12)
    assert result.value("ce_spliced") == result.value("ce_orig")
    assert result.value("kl_spliced") == 0.0
    assert result.value("ce_recovered") == 1.0 and result.value("kl_recovered") == 1.0
    assert result.value("ce_recovered_mean") == 1.0
    assert result.value("top1_agreement") == 1.0
    assert result.value("l0") == 16.0
    assert result.value("explained_variance_per_token") == pytest.approx(1.0)


def test_silent_coder_is_zero_ablation(lm, tokens):
    result = evaluate(silent(), lm, tokens)
    assert result.value("ce_spliced") == result.value("ce_ablated_zero")
    assert result.value("kl_spliced") == result.value("kl_ablated_zero")
    assert result.value("ce_spliced") != pytest.approx(result.value("ce_orig"), rel=1e-3)
    assert result.value("ce_recovered") == 0.0 and result.value("kl_recovered") == 0.0
    assert result.value("l0") == 0.0 and result.value("alive_fraction") == 0.0
    assert result.value("nmse") == pytest.approx(1.0)


def test_mean_coder_is_mean_ablation(lm, tokens):
    coder = silent()
    acts = lm.capture(tokens, HOOK)[HOOK][:, 1:]
    with torch.no_grad():
        coder.b_dec.copy_(acts.reshape(-1, 16).double().mean(0))
    result = evaluate(coder, lm, tokens)
    assert result.value("ce_spliced") == pytest.approx(result.value("ce_ablated_mean"), abs=1e-6)
    assert result.value("ce_recovered_mean") == pytest.approx(0.0, abs=1e-5)
    assert result.value("fvu") == pytest.approx(1.0, abs=1e-6)


def test_one_layer_by_hand():
    """Token i predicts i + 1 (mod 4) with logit 2a against 0; the coder keeps tokens 0 and 1 and drops 2 and 3."""
    a = 1.5
    model = llama(
        vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(2 * torch.eye(4))  # RMS 1: the final norm leaves it alone
        model.lm_head.weight.copy_(a * torch.eye(4).roll(1, dims=0))
    config = CoderConfig(reads=(HOOK,), d_in=4, n_latents=4, activation=ReLU(), pre_bias="none")
    coder = with_policy(SparseCoder(config), InputPolicy(bos="none", skip_first=0)).eval()
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(4))
        coder.W_dec.copy_(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    # Predictions are made from 0, 1, 2, 3 and all come true, then from 0 and 2, which do not.
    tokens = torch.tensor([[0, 1, 2, 3, 0], [0, 2, 0, 2, 1]])
    right = math.log(1 + 3 * math.exp(-2 * a))
    wrong = right + 2 * a
    flat = math.log(4)
    result = evaluate(coder, LanguageModel(model, "hand-made"), tokens)
    assert result.value("ce_orig") == pytest.approx((4 * right + 4 * wrong) / 8, abs=1e-5)
    assert result.value("ce_ablated_zero") == pytest.approx(flat, abs=1e-5)
    spliced = (2 * right + 2 * flat + 2 * wrong + 2 * flat) / 8
    assert result.value("ce_spliced") == pytest.approx(spliced, abs=1e-5)
    top = math.exp(-right)
    kl_flat = top * math.log(4 * top) + (1 - top) * math.log(4 * (1 - top) / 3)
    assert result.value("kl_spliced") == pytest.approx(kl_flat / 2, abs=1e-5)
    assert result.value("kl_recovered") == pytest.approx(0.5, abs=1e-5)
    # Norms are all 2; token 2 fires its latent but its decoder row is zero.
    assert result.value("nmse") == pytest.approx(4 / 10)
    assert result.value("l0") == 1.0 and result.value("alive_fraction") == 1.0
    assert result.settings["predictions"] == 8 and result.settings["tokens_counted"] == 10


def test_against_a_plain_recomputation(lm, tokens):
    """Whole logits, a hook written by hand, no chunks: the same numbers."""
    coder = lossy()
    result = evaluate(coder, lm, tokens)
    mask = torch.ones(6, 12, dtype=torch.bool)
    mask[:, 0] = False
    acts = lm.capture(tokens, HOOK)[HOOK]
    xhat = coder(acts).reconstruction.detach()

    def replaced(_module, _args, output):
        return torch.where(mask[..., None], xhat, output)

    with torch.no_grad():
        original = lm.model(tokens).logits
        handle = lm.model.model.layers[0].register_forward_hook(replaced)
        spliced = lm.model(tokens).logits
        handle.remove()
    targets = tokens[:, 2:]
    ce = torch.nn.functional.cross_entropy(spliced[:, 1:-1].reshape(-1, 31), targets.reshape(-1))
    assert result.value("ce_spliced") == pytest.approx(float(ce), abs=1e-5)
    log_p, log_q = (x[:, 1:-1].double().log_softmax(-1) for x in (original, spliced))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert result.value("kl_spliced") == pytest.approx(float(kl), abs=1e-5)
    agree = (original.argmax(-1) == spliced.argmax(-1))[:, 1:-1].double().mean()
    assert result.value("top1_agreement") == pytest.approx(float(agree))
    x, e = acts[mask].double(), (acts - xhat)[mask].double()
    assert result.value("fvu") == pytest.approx(float(e.square().sum() / (x - x.mean(0)).square().sum()), rel=1e-6)
    per_token = (1 - e.square().sum(-1) / (x - x.mean(0)).square().sum(-1)).mean()
    assert result.value("explained_variance_per_token") == pytest.approx(float(per_token), rel=1e-6)


def test_independent_of_batch_size(lm, tokens):
    results = [evaluate(lossy(), lm, tokens, batch=batch) for batch in (1, 4, 6)]
    for other in results[1:]:
        assert other.histogram == results[0].histogram
        # Only the float32 products of the model differ; a ratio of small differences shows them most.
        assert numbers(other) == pytest.approx(numbers(results[0]), rel=1e-3, abs=1e-6)


def test_several_coders_each_alone(lm, tokens):
    mlp = "blocks.1.mlp_out"
    coders = {"a": lossy(), "b": perfect(), "c": silent(mlp)}
    together = evaluate(coders, lm, tokens)
    for name, coder in coders.items():
        alone = evaluate(coder, lm, tokens)
        assert numbers(together[name]) == numbers(alone)
        assert together[name].settings == alone.settings


def test_transcoder_reads_here_and_writes_there(lm, tokens):
    reads, writes = "blocks.1.mlp_in", "blocks.1.mlp_out"
    config = CoderConfig(reads=(reads,), writes=(writes,), d_in=16, n_latents=8, activation=ReLU(), pre_bias="none")
    coder = with_policy(SparseCoder(config)).eval()
    with torch.no_grad():
        coder.b_enc.fill_(-1e6)
    result = evaluate(coder, lm, tokens)
    assert result.value("ce_spliced") == result.value("ce_ablated_zero")
    target = lm.capture(tokens, writes)[writes][:, 1:].double().reshape(-1, 16)
    centred = (target - target.mean(0)).square().sum()
    assert result.value("fvu") == pytest.approx(float(target.square().sum() / centred), rel=1e-6)
    assert result.settings["hooks"] == {"reads": [reads], "writes": [writes]}


def test_a_coder_after_the_blocks(lm, tokens):
    """The head's input: logits cannot be taken from the last block's stream."""
    result = evaluate(silent("final_norm"), lm, tokens)
    assert result.value("ce_spliced") == result.value("ce_ablated_zero") == pytest.approx(math.log(31), abs=1e-5)
    assert evaluate(perfect("final_norm"), lm, tokens).value("kl_spliced") == 0.0


def test_masked_positions_are_left_alone(lm, tokens):
    """With every position but the fifth masked, only what comes from there changes."""
    skipped = tuple(sorted(set(tokens.flatten().tolist()) - {int(tokens[0, 5])}))
    policy = InputPolicy(bos="none", skip_first=0, skip_ids=skipped)
    result = evaluate(with_policy(silent(), policy), lm, tokens)
    counted = int((tokens == tokens[0, 5]).sum())
    assert result.settings["tokens_counted"] == counted < tokens.numel()
    assert result.settings["mask"] == {"skip_first": 0, "skip_ids": list(skipped)}
    acts = lm.capture(tokens, HOOK)[HOOK]
    acts[tokens == tokens[0, 5]] = 0.0
    with torch.no_grad():
        spliced = lm.spliced_logits(tokens, {HOOK: lambda _: acts})
    where = (tokens == tokens[0, 5])[:, :-1]
    ce = torch.nn.functional.cross_entropy(spliced[:, :-1][where], tokens[:, 1:][where])
    assert result.value("ce_spliced") == pytest.approx(float(ce), abs=1e-5)


def test_result_is_json_and_states_its_terms(lm, tokens, tmp_path):
    result = evaluate(lossy(), lm, tokens, tokens=25, ablations=["zero"])
    path = tmp_path / "evaluation.json"
    result.save(path)
    assert Evaluation.load(path).as_dict() == result.as_dict() == json.loads(path.read_text())
    settings = result.settings
    assert settings["contexts"] == 3 and settings["tokens"] == 36  # whole contexts
    assert settings["tokens_counted"] == 33 and settings["predictions"] == 30
    assert settings["error"] == "drop" and settings["policy"]["skip_first"] == 1
    assert settings["interval"]["level"] == 0.95
    assert "mean" not in settings["ablations"] and "ce_ablated_mean" not in result
    assert set(result["ce_increase"]) == {"value", "low", "high"}
    assert result["fvu"]["low"] <= result["fvu"]["value"] <= result["fvu"]["high"]
    with pytest.raises(KeyError, match="Did you mean 'fvu'"):
        result["fvuu"]


def test_local_metrics_from_cached_activations(lm, tokens):
    coder = lossy()
    acts = lm.capture(tokens, HOOK)[HOOK][:, 1:]
    rows = [(acts[i], torch.full((11,), i)) for i in range(6)]
    cached = evaluate(coder, lm, tokens, activations=iter(rows))
    whole = evaluate(coder, lm, tokens)
    for name in ("fvu", "l0", "cosine", "ce_spliced"):
        assert cached.value(name) == pytest.approx(whole.value(name), rel=1e-6)
    assert cached.settings["local_metrics"]["tokens_counted"] == 66
    assert "explained_variance_per_token" not in cached
    with pytest.raises(ConfigError, match="one coder's hook"):
        evaluate({"a": coder, "b": coder}, lm, tokens, activations=rows)


@pytest.mark.parametrize("attend_across", [True, False])
def test_packed_shards(tmp_path, prose, tiny_tokenizer, attend_across):
    """Real shards: the role asked for, the shards' mask, documents kept apart where the policy says so."""
    from unmix.data.config import DataConfig
    from unmix.data.tokenise import tokenise

    text = tmp_path / "text"
    text.mkdir()
    for i, paragraph in enumerate(prose):
        (text / f"{i}.txt").write_text(paragraph[:300])
    policy = InputPolicy(attend_across=attend_across, skip_first=2)
    config = DataConfig(source=str(text), tokens=1200, context=24, policy=policy)
    shards = tokenise(config, tiny_tokenizer, tmp_path / "shards", progress=False)
    model = LanguageModel(llama(vocab_size=600), "tiny")
    result = evaluate(with_policy(perfect(), policy), model, shards, role="score")
    ids = shards.contexts_of("score")
    assert result.settings["contexts"] == len(ids) and result.settings["data"]["hash"] == shards.hash
    assert result.settings["tokens_counted"] == 22 * len(ids) and result.settings["predictions"] == 21 * len(ids)
    assert result.settings["policy_is_the_coders"] is True  # ids left open in the coder's agree with any
    assert result.value("ce_spliced") == result.value("ce_orig")
    tokens = torch.from_numpy(shards.tokens(ids)).long()
    logits = model.logits(tokens, None if attend_across else shards.documents(ids))
    ce = torch.nn.functional.cross_entropy(logits[:, 2:-1].reshape(-1, 600), tokens[:, 3:].reshape(-1))
    assert result.value("ce_orig") == pytest.approx(float(ce), abs=1e-5)


@pytest.mark.parametrize("attend_across", [True, False])
def test_blocks_below_the_first_write_run_once(attend_across, monkeypatch):
    """Spliced and ablated passes begin behind them; every number is the same to the bit."""
    from unmix.evaluate import splicing
    from unmix.lm import start

    policy = InputPolicy(bos="none", skip_first=1, attend_across=attend_across)
    lm = LanguageModel(llama(num_hidden_layers=4), "deep")
    passes = [0] * 4
    for i in range(4):
        lm.model.model.layers[i].mlp.register_forward_pre_hook(
            lambda module, args, i=i: passes.__setitem__(i, passes[i] + 1)
        )
    tokens = torch.randint(0, 31, (6, 12), generator=torch.Generator().manual_seed(1))
    reads = CoderConfig(
        reads=("blocks.0.resid_post",), writes=("blocks.3.mlp_out",), d_in=16, n_latents=8, activation=TopK(k=2),
        pre_bias="none",
    )  # fmt: skip
    coders = {
        "low": with_policy(lossy("blocks.0.resid_post"), policy), "mid": with_policy(lossy("blocks.2.mlp_in"), policy),
        "high": with_policy(SparseCoder(reads, seed=1).eval(), policy),
    }  # fmt: skip
    found = evaluate(coders, lm, tokens, batch=6)
    monkeypatch.setattr(start, "_believed", lambda lm, found: True)
    passes[:] = [0] * 4
    assert numbers(evaluate(coders, lm, tokens, batch=6)["mid"]) == numbers(found["mid"])
    # The mean's pass and the one as it is, then three a coder from its first write on.
    assert passes == [2, 2 + 3, 2 + 6, 2 + 9]
    monkeypatch.setattr(splicing, "find_start", lambda lm, hooks: None)
    plain = evaluate(coders, lm, tokens, batch=6)
    for name in coders:
        assert numbers(found[name]) == numbers(plain[name])


def test_bfloat16_model_and_perfect_coder(tokens):
    result = evaluate(perfect(), LanguageModel(llama().bfloat16(), "half"), tokens)
    assert result.settings["model"]["dtype"] == "bfloat16" and result.settings["coder"]["dtype"] == "float32"
    assert result.value("ce_spliced") == result.value("ce_orig")
    assert result.value("fvu") == pytest.approx(0.0, abs=1e-12)


def test_policy_of_others_is_said(lm, tokens, caplog):
    from unmix.evaluate.contexts import TokenTensor

    data = TokenTensor(tokens, InputPolicy(bos="none", skip_first=2))
    result = evaluate(lossy(), lm, data)
    assert result.settings["policy_is_the_coders"] is False
    assert "another input policy" in caplog.text
    assert evaluate(lossy(), lm, TokenTensor(tokens, POLICY)).settings["policy_is_the_coders"] is True


def test_errors_come_before_work(lm, tokens):
    with pytest.raises(ConfigError, match="unknown ablation 'none'; allowed: zero, mean"):
        evaluate(lossy(), lm, tokens, ablations=["none"])
    with pytest.raises(ConfigError, match="no coder given"):
        evaluate({}, lm, tokens)
    with pytest.raises(DataError, match="whole numbers"):
        evaluate(lossy(), lm, tokens.float())
    with pytest.raises(ModelError, match=r"12 values at blocks\.0\.resid_post, which is 16 wide"):
        evaluate(lossy(width=12), lm, tokens)
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        evaluate(lossy(), lm, tokens, batch=0)
    with pytest.raises(DataError, match="nothing to predict"):
        evaluate(with_policy(lossy(), InputPolicy(bos="none", skip_first=11)), lm, tokens)


def test_non_finite_activations_and_logits_are_named(tokens):
    model = llama()
    lm = LanguageModel(model, "broken")
    with torch.no_grad():
        model.model.embed_tokens.weight[int(tokens[2, 3])] = float("nan")
    with pytest.raises(NonFiniteError, match=r"activations at blocks.0.resid_post are not finite at \d+ positions"):
        evaluate(lossy(), lm, tokens, batch=2)
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"original logits: \d+ predictions with non-finite cross-entropy"):
        evaluate(lossy(), LanguageModel(model, "broken"), tokens)
