"""End-to-end training: gradients through the frozen model into the coders, and into nothing else."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lm.families import raw_model, some_tokens
from unmix.coder.config import CoderConfig, Identity, ReLU, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.core.policy import InputPolicy
from unmix.lm import LanguageModel
from unmix.lm.contexts import TokenTensor
from unmix.train.checkpoint import save_checkpoint
from unmix.train.config import OptimConfig
from unmix.train.feeds import RowFeed
from unmix.train.learner import Learner
from unmix.train.objectives import Step
from unmix.train.objectives.tiles import LinearHead
from unmix.train.source import TensorSource
from unmix.train.spliced import SplicedFeed, StagedFeed, spliced_together, with_model
from unmix.train.timing import Clock
from unmix.train.trainer import GroupTrainer, Job

POLICY = InputPolicy(bos="none", skip_first=1)
KL = {"term": "kl"}
CE = {"term": "ce", "weight": 0.7}
LATER = {"term": "downstream", "weight": 0.3, "hooks": ["blocks.2.resid_pre", "layers.2"]}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model of one's own: tests look at its state."""
    return LanguageModel(raw_model(family).to(dtype), f"tiny-{family}")


def texts(n: int = 12, length: int = 9) -> TokenTensor:
    """Some contexts."""
    return TokenTensor(some_tokens(n, length), POLICY)


def coder_at(hook: str, width: int = 16, name: str = "", n: int = 32, **changes: Any) -> CoderConfig:
    """A coder at one hook."""
    return CoderConfig(**{
        "name": name, "reads": (hook,), "d_in": width, "n_latents": n, "activation": TopK(k=4),
        "input_policy": POLICY, **changes,
    })  # fmt: skip


def optim(*objective: Mapping[str, Any], **changes: Any) -> OptimConfig:
    """Few steps of 16 positions."""
    settings: dict[str, Any] = {
        "batch": 16, "tokens": 160, "init_rows": 32, "lr": 3e-3, "log_every": 2, "checkpoint_every": 4,
        "warmup": 0.0, "objective": objective, **changes,
    }  # fmt: skip
    return OptimConfig(**settings)


def trainer_of(
    folder: Path,
    lm: LanguageModel,
    coders: Mapping[str, CoderConfig],
    config: OptimConfig,
    groups: Sequence[Sequence[str]] | None = None,
    data: TokenTensor | None = None,
) -> GroupTrainer:
    """Everything end to end."""
    feed = SplicedFeed(lm, data or texts(), coders, 0, groups)
    return GroupTrainer({name: Job(coder, config) for name, coder in coders.items()}, feed, folder, "key")


def only_step(trainer: GroupTrainer) -> dict[str, Step]:
    """The first batch's steps, all of one graph."""
    (found,) = trainer.feed.steps(0, trainer.config.batch, trainer.learners)
    return found


def plain(lm: LanguageModel, batch: Tensor, coders: Sequence[SparseCoder], later: Sequence[str]) -> dict[str, Tensor]:
    """kl, ce and downstream by two whole passes with torch's own hooks and nothing clever."""
    model: Any = lm.model
    blocks: Any = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    mask = torch.ones_like(batch, dtype=torch.bool)
    mask[:, 0] = False
    streams: list[list[Tensor]] = []

    def run(edits: Mapping[int, SparseCoder]) -> Tensor:
        streams.append([])
        handles = []
        for i, block in enumerate(blocks):

            def hook(_m: Any, _a: Any, x: Tensor, i: int = i) -> Tensor:
                x = torch.where(mask.unsqueeze(-1), edits[i](x).reconstruction, x) if i in edits else x
                streams[-1].append(x)
                return x

            handles.append(block.register_forward_hook(hook))
        try:
            return model(batch).logits
        finally:
            for handle in handles:
                handle.remove()

    with torch.no_grad():
        original = run({})
    spliced = run({int(coder.config.reads[0].split(".")[1]): coder for coder in coders})
    log_p, log_q = original.log_softmax(-1), spliced.log_softmax(-1)
    ends = {"blocks.2.resid_pre": 1, "layers.2": 2}
    errors = [(streams[1][ends[hook]] - streams[0][ends[hook]])[mask].square().mean() for hook in later]
    ce = functional.cross_entropy(spliced[:, 1:-1].flatten(0, 1), batch[:, 2:].flatten())
    return {
        "kl": functional.kl_div(log_q[mask], log_p[mask], log_target=True, reduction="batchmean"),
        "ce": ce, "downstream": torch.stack(errors).mean() if errors else torch.zeros(()),
    }  # fmt: skip


def close(one: Tensor, other: Tensor, family: str) -> None:
    """To float64; a Llama's norms round to float32 on the way, forth and back."""
    size = other.abs().max().item()
    torch.testing.assert_close(one, other, rtol=0, atol=size * (1e-6 if family == "llama" else 1e-10))


def doubled(trainer: GroupTrainer) -> None:
    """Weights in float64."""
    for learner in trainer.learners.values():
        learner.coder.double()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "objective", [(KL,), (CE,), (LATER,), (KL, CE, LATER, {"term": "mse"})], ids=["kl", "ce", "downstream", "mix"]
)
def test_values_and_gradients_are_those_of_two_plain_passes(
    family: str, objective: tuple[dict[str, Any], ...], tmp_path: Path
) -> None:
    """float64, every parameter; e2e_sae's formulas are these, over all positions."""
    lm = model_of(family, torch.float64)
    trainer = trainer_of(tmp_path, lm, {"a": coder_at("blocks.1.resid_post")}, optim(*objective))
    doubled(trainer)
    learner = trainer.learners["a"]
    step = only_step(trainer)["a"]
    loss, values = learner.loss(step)
    loss.backward()
    found = {name: p.grad.clone() for name, p in learner.coder.named_parameters() if p.grad is not None}
    learner.coder.zero_grad()
    feed = trainer.feed
    assert isinstance(feed, SplicedFeed)
    batch = feed.contexts(0, 16).tokens
    assert batch.shape == (2, 9)
    expected = plain(lm, batch, [learner.coder], LATER["hooks"])
    whole = sum(
        (spec.get("weight", 1.0) * expected[spec["term"]] for spec in objective if spec["term"] != "mse"),
        torch.zeros((), dtype=torch.float64),
    )
    if {"term": "mse"} in objective:
        x = lm.capture(batch, "blocks.1.resid_post")["blocks.1.resid_post"][:, 1:].reshape(-1, 16)
        s, _ = learner.coder.prepare(x)
        again = learner.forward(x, x)
        mse = (s - again.reconstruction).square().sum(-1).mean() / learner.state.variance
        assert values["mse"] == pytest.approx(mse.item())
        whole = whole + mse
    for spec in objective:
        if spec["term"] != "mse":
            assert values[spec["term"]] == pytest.approx(expected[spec["term"]].item(), rel=1e-9)
    assert isinstance(whole, Tensor)
    whole.backward()
    assert "W_enc" in found
    for name, p in learner.coder.named_parameters():
        if p.grad is not None:
            close(found[name], p.grad, family)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_coders_together_share_one_pass_and_one_loss(family: str, tmp_path: Path) -> None:
    """The second reads what the first left; kl reaches each once, though both ask for it."""
    lm = model_of(family, torch.float64)
    coders = {"a": coder_at("blocks.0.resid_post", name="a"), "b": coder_at("blocks.1.resid_post", name="b")}
    trainer = trainer_of(tmp_path, lm, coders, optim(KL, LATER), [["a", "b"]])
    doubled(trainer)
    steps = only_step(trainer)
    losses = [trainer.learners[name].loss(step) for name, step in steps.items()]
    torch.autograd.backward([loss for loss, _ in losses])
    both = [trainer.learners[name].coder for name in ("a", "b")]
    found = [{n: p.grad.clone() for n, p in coder.named_parameters() if p.grad is not None} for coder in both]
    feed = trainer.feed
    assert isinstance(feed, SplicedFeed)
    for coder in both:
        coder.zero_grad()
    expected = plain(lm, feed.contexts(0, 16).tokens, both, LATER["hooks"])
    assert [values["kl"] for _, values in losses] == pytest.approx([expected["kl"].item()] * 2)
    (expected["kl"] + 0.3 * expected["downstream"]).backward()
    for coder, grads in zip(both, found, strict=True):
        assert grads["W_enc"].norm().item() > 0
        for name, p in coder.named_parameters():
            if p.grad is not None:
                close(grads[name], p.grad, family)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was_and_the_loss_falls(family: str, tmp_path: Path) -> None:
    """Weights, flags and modules; its parameters get no gradient though they ask for one."""
    lm = model_of(family)
    lm.model.train()
    lm.model.requires_grad_(True)
    before = copy.deepcopy(lm.model.state_dict())
    trainer = trainer_of(
        tmp_path, lm, {"a": coder_at("blocks.1.resid_post")}, optim(KL, LATER, tokens=1600, lr=1e-2, log_every=5)
    )
    first = [trainer.group_step()["a"].terms["kl"] for _ in range(10)]
    for _ in range(80):
        trainer.group_step()
    last = [trainer.group_step()["a"].terms["kl"] for _ in range(10)]
    assert sum(last) < 0.6 * sum(first)
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())
    assert all(module.training for module in lm.model.modules())
    assert not any("forward" in module.__dict__ for module in lm.model.modules())
    assert all(torch.equal(before[name], value) for name, value in lm.model.state_dict().items())


def test_a_perfect_coder_costs_nothing(tmp_path: Path) -> None:
    """kl and downstream are 0, ce is the model's own."""
    lm = model_of("llama")
    config = coder_at("blocks.1.resid_post", n=16, activation=Identity(), pre_bias="none")
    trainer = trainer_of(tmp_path, lm, {"a": config}, optim(KL, CE, LATER))
    coder = trainer.learners["a"].coder
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(16))
        coder.W_dec.copy_(torch.eye(16))
        coder.b_dec.zero_()
    _, values = trainer.learners["a"].loss(only_step(trainer)["a"])
    assert values["kl"] == pytest.approx(0, abs=1e-6)
    assert values["downstream"] == pytest.approx(0, abs=1e-8)
    feed = trainer.feed
    assert isinstance(feed, SplicedFeed)
    batch = feed.contexts(0, 16).tokens
    own = functional.cross_entropy(lm.logits(batch)[:, 1:-1].flatten(0, 1), batch[:, 2:].flatten())
    assert values["ce"] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_masked_positions_pass_untouched(together: bool, tmp_path: Path) -> None:
    """Bit for bit, in the stream that flows on."""
    lm = model_of("llama")
    coders = {"a": coder_at("blocks.0.resid_post", name="a"), "b": coder_at("blocks.1.resid_post", name="b")}
    trainer = trainer_of(tmp_path, lm, coders, optim(KL), [["a", "b"]] if together else None)
    for _ in trainer.feed.steps(0, 16, trainer.learners):
        pass  # every hook of ours is in place now, so that the one below comes after them
    seen: list[Tensor] = []
    model: Any = lm.model
    handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out.detach().clone()))
    for _ in trainer.feed.steps(0, 16, trainer.learners):
        pass
    handle.remove()
    bare, *spliced = seen
    assert len(spliced) == (1 if together else 2)
    for x in spliced:
        assert torch.equal(x[:, 0], bare[:, 0])
        assert not torch.isclose(x[:, 1:], bare[:, 1:]).all(-1).any()


def test_a_sweep_shares_the_bare_pass_and_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three configurations: the block below the hook runs once, those above once a coder; no head for downstream."""
    lm = model_of("llama")
    model: Any = lm.model
    ran: list[str] = []
    for name, module in {"0": model.model.layers[0], "2": model.model.layers[2], "head": model.lm_head}.items():
        inner = module.forward
        monkeypatch.setattr(
            module, "forward", lambda *a, inner=inner, name=name, **k: (ran.append(name), inner(*a, **k))[1]
        )
    coders = {f"k{k}": coder_at("blocks.1.resid_post", name=f"k{k}", activation=TopK(k=k)) for k in (1, 2, 4)}
    later = {"term": "downstream", "hooks": ["blocks.2.resid_post"]}
    trainer = trainer_of(tmp_path, lm, coders, optim(later))
    trainer.group_step()
    ran.clear()
    trainer.group_step()
    assert ran == ["0", "2", "2", "2", "2"]


def test_first_rows_are_made_once_for_coders_at_one_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, and the look for outliers, of four coders take the model's passes of one; then the rows are let go."""
    ran = 0
    lm = model_of("llama")
    model: Any = lm.model
    inner = model.model.layers[0].forward

    def counted(*args: Any, **keywords: Any) -> Any:
        nonlocal ran
        ran += 1
        return inner(*args, **keywords)

    monkeypatch.setattr(model.model.layers[0], "forward", counted)
    counts: list[int] = []
    for n in (1, 4):
        ran = 0
        coders = {f"c{i}": coder_at("blocks.1.resid_post", name=f"c{i}") for i in range(n)}
        trainer = trainer_of(tmp_path / str(n), lm, coders, optim(KL))
        counts.append(ran)
        feed = trainer.feed
        assert isinstance(feed, SplicedFeed)
        assert feed.sample(coders["c0"]) is feed.sample(coders["c0"])
        held = feed.sample(coders["c0"])
        trainer.group_step()
        assert feed.sample(coders["c0"]) is not held
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt_350m", "gemma2", "granite"])
def test_heads_that_end_in_a_product_go_by_tiles(family: str) -> None:
    """Their parts give the head's own logits; a scale or a soft cap behind the product leaves whole rows."""
    lm = model_of(family)
    feed = SplicedFeed(lm, texts(), {"a": coder_at("blocks.0.resid_post")}, 0)
    head = feed._head  # pyright: ignore[reportPrivateUsage]
    assert isinstance(head, LinearHead) == (family not in ("gemma2", "granite"))
    stream = torch.randn(5, lm.d_model)
    torch.testing.assert_close(head(stream), lm.unembed(stream), rtol=1e-6, atol=1e-6)


def test_gradients_of_a_sweep_are_those_of_each_alone(tmp_path: Path) -> None:
    """Coders that share the bare pass do not disturb each other."""
    lm = model_of("gpt2")
    coders = {f"k{k}": coder_at("blocks.1.resid_post", name=f"k{k}", activation=TopK(k=k)) for k in (1, 4)}
    group = trainer_of(tmp_path / "group", lm, coders, optim(KL))
    for _ in range(3):
        group.group_step()
    for name, config in coders.items():
        alone = trainer_of(tmp_path / name, lm, {name: config}, optim(KL))
        for _ in range(3):
            alone.group_step()
        assert alone.learners[name].coder.hash() == group.learners[name].coder.hash()


def staged(folder: Path, lm: LanguageModel) -> GroupTrainer:
    """Local first, the last half with KL."""
    config = optim({"term": "mse"}, {**KL, "weight": 0.1, "start": 0.5})
    coders = {"a": coder_at("blocks.1.resid_post", name="a")}
    rows = lm.capture(texts().ids, "blocks.1.resid_post")["blocks.1.resid_post"][:, 1:].reshape(-1, 16)
    feed = StagedFeed(RowFeed(TensorSource(rows)), SplicedFeed(lm, texts(), coders, 0))
    return GroupTrainer({"a": Job(coders["a"], config)}, feed, folder, "key")


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_late_fine_tuning_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    """Before, at and after the turn from rows to the spliced model."""
    lm = model_of("llama")
    straight = staged(tmp_path / "straight", lm)
    straight.run()
    broken = staged(tmp_path / "broken", lm)
    for _ in range(stop):
        metrics = broken.group_step()["a"]
        assert ("kl" in metrics.terms) == (metrics.step > 5)
    broken.checkpoint()
    again = staged(tmp_path / "broken", lm)
    assert again.at == stop
    again.run()
    for name, trainer in (("one", straight), ("two", again)):
        parts = {"a": (trainer.learners["a"].coder, trainer.learners["a"].optimiser, trainer.learners["a"].state)}
        save_checkpoint(tmp_path / name, "key", parts)
    one, two = ((tmp_path / name / "state.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


class Mixer(nn.Module):
    """A language model of nobody's family."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 12)
        self.hidden = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        self.head = nn.Linear(12, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(tokens)
        return self.head(x + self.hidden(x.cumsum(1)))


def test_any_module_with_logits(tmp_path: Path) -> None:
    """Hooks are module paths; logits are taken as they come, and only at positions that count."""
    lm = LanguageModel(Mixer(), "mixer")
    config = coder_at("hidden.0", 12, name="a")
    later = {"term": "downstream", "hooks": ["hidden.2"]}
    trainer = trainer_of(tmp_path, lm, {"a": config}, optim(KL, CE, later, tokens=960, lr=1e-2))
    first = trainer.group_step()["a"].terms
    for _ in range(50):
        last = trainer.group_step()["a"].terms
    assert last["kl"] < 0.6 * first["kl"]
    assert all(p.grad is None for p in lm.model.parameters())


def test_a_transcoder_and_a_crosscoder(tmp_path: Path) -> None:
    """One reads before it writes; the other writes several places of one pass."""
    lm = model_of("llama")
    through = coder_at("blocks.1.mlp_in", name="t", writes=("blocks.1.mlp_out",), d_out=16, pre_bias="none", skip=True)
    hooks = ("blocks.0.resid_post", "blocks.1.resid_post")
    across = coder_at("", name="c", reads=hooks, writes=hooks, d_in=32, d_out=32)
    for name, config in (("t", through), ("c", across)):
        trainer = trainer_of(tmp_path / name, lm, {name: config}, optim(KL, {"term": "mse"}))
        metrics = trainer.group_step()[name]
        assert metrics.terms["kl"] > 0
        assert metrics.l0 == 4


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm"])
def test_the_splice_gets_what_the_coder_gives(normalise: str, tmp_path: Path) -> None:
    """Through scales and the way back of a normalisation: as the finished coder writes."""
    from unmix.train.splices import raw_output

    lm = model_of("llama")
    config = coder_at("blocks.1.resid_post", normalise={"kind": normalise, "restore": True})
    learner: Learner = trainer_of(tmp_path, lm, {"a": config}, optim(KL)).learners["a"]
    x = torch.randn(5, 16) * 3
    step = learner.forward(x, x)
    torch.testing.assert_close(raw_output(learner.coder, step.reconstruction, x), learner.coder(x).reconstruction)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    """Downstream of nothing, model terms without a model, groups that leave a coder out."""
    lm = model_of("llama")
    coders = {"a": coder_at("blocks.1.resid_post", name="a")}
    before = {"term": "downstream", "hooks": ["blocks.0.resid_post"]}
    with pytest.raises(ConfigError, match=r"^downstream: nothing of a reaches blocks\.0\.resid_post; give later"):
        trainer_of(tmp_path / "1", lm, coders, optim(before)).group_step()
    rows = RowFeed(TensorSource(torch.randn(64, 16)))
    with pytest.raises(ConfigError, match=r"^a: the term kl looks at the language model run through the recon"):
        GroupTrainer({"a": Job(coders["a"], optim(KL))}, rows, tmp_path / "2", "key").group_step()
    with pytest.raises(ConfigError, match=r"each of a is in one group"):
        SplicedFeed(lm, texts(), coders, 0, [["a", "b"]])
    with pytest.raises(ConfigError, match=r"^a: downstream needs hooks, each once; found \[\]$"):
        trainer_of(tmp_path / "3", lm, coders, optim({"term": "downstream", "hooks": []}))


def test_relu_with_a_penalty_mixes_with_the_model(tmp_path: Path) -> None:
    """The paper's own architecture: kl, downstream and l1 of one coder."""
    lm = model_of("gpt2")
    config = coder_at("blocks.1.resid_post", name="a", activation=ReLU())
    trainer = trainer_of(tmp_path, lm, {"a": config}, optim(KL, LATER, {"term": "l1", "weight": 1e-3}))
    assert set(trainer.group_step()["a"].terms) == {"kl", "downstream", "l1"}


def test_a_run_runs_the_model_only_while_a_term_looks_at_it() -> None:
    """Rows alone, the model throughout, or one after the other; and who stands in which pass."""
    lm = model_of("llama")
    rows = RowFeed(TensorSource(torch.randn(64, 16)))
    made: list[str] = []

    def loaded() -> LanguageModel:
        made.append("lm")
        return lm

    def feed_of(*objective: Mapping[str, Any]) -> object:
        jobs = {"a": Job(coder_at("blocks.1.resid_post", name="a"), optim(*objective))}
        return with_model(rows, loaded, texts(), jobs, 0, Clock())

    assert feed_of({"term": "mse"}) is rows
    assert feed_of({"term": "mse"}, {"term": "kl", "weight": 0}) is rows
    assert made == []
    assert isinstance(feed_of(KL), SplicedFeed)
    assert isinstance(feed_of({"term": "mse"}, {**KL, "start": 0.9}), StagedFeed)
    together, alone = optim(KL, splice="together"), optim(KL)
    hooks = {"a": 0, "b": 1, "c": 0, "d": 1, "e": 2}
    jobs = {
        name: Job(coder_at(f"blocks.{layer}.resid_post", name=name), alone if name == "e" else together)
        for name, layer in hooks.items()
    }
    assert spliced_together(jobs) == [["a", "b"], ["c", "d"], ["e"]]


def test_rows_of_a_batch_have_a_place_in_the_text() -> None:
    """Row 8 of contexts with 8 positions that count is the second context's first."""
    feed = SplicedFeed(model_of("llama"), texts(), {"a": coder_at("blocks.1.resid_post", name="a")}, 0)
    contexts = feed.contexts(3, 16).contexts.tolist()
    assert feed.places(3, 16, [0, 8, 15]) == [
        {"row": 0, "context": contexts[0], "position": 1},
        {"row": 8, "context": contexts[1], "position": 1},
        {"row": 15, "context": contexts[1], "position": 8},
    ]
