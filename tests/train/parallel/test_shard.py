"""Slices of a coder: which latents, which first weights, and what cannot be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from train.toys import planted
from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, ResumeError
from unmix.run.team import join
from unmix.train.config import OptimConfig
from unmix.train.feeds import RowFeed
from unmix.train.parallel.checkpoint import load_mesh, save_mesh
from unmix.train.parallel.config import ParallelConfig
from unmix.train.parallel.learner import ShardLearner
from unmix.train.parallel.mesh import Mesh, Team
from unmix.train.parallel.shard import draw_weights, drawn_rows, shard_of, slice_of
from unmix.train.parallel.trainer import MeshTrainer
from unmix.train.source import TensorSource
from unmix.train.trainer import Job

from .threads import ThreadMesh

TOPK: dict[str, Any] = {"kind": "topk", "k": 3}


def config(**changes: Any) -> CoderConfig:
    """A coder of 48 latents."""
    return CoderConfig.model_validate({"name": "it", "d_in": 8, "n_latents": 48, "activation": TOPK, **changes})


@pytest.mark.parametrize(("n", "d"), [(48, 8), (50, 7), (33, 1), (16, 3), (5, 3), (2, 3), (200, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_drawn_in_chunks_are_those_drawn_at_once(n: int, d: int, dtype: torch.dtype) -> None:
    """Though torch fills tensors 16 numbers at a time; and the generator stands where it would."""
    whole, parts = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        expected, after = torch.randn(n, d, generator=whole), torch.randn(20, generator=whole)
        own = slice(n // 3, n - n // 4)
        assert torch.equal(drawn_rows(parts, n, d, own, chunk=16 * d), expected[own])
        assert torch.equal(torch.randn(20, generator=parts), after)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("changes", [{}, {"d_out": 5, "pre_bias": "none", "writes": ("b",)}])
def test_slices_together_are_the_fresh_coder(changes: dict[str, Any]) -> None:
    """Encoder and decoder, whether or not they share their first rows."""
    whole = SparseCoder(config(**changes), seed=7)
    for rank in range(4):
        mesh = ThreadMesh(rank, 1, 4)
        part = SparseCoder(shard_of(whole.config, mesh.dictionary), seed=7)
        draw_weights(part, whole.config, 7, mesh)
        own = slice_of(whole.config, mesh)
        assert torch.equal(part.W_dec, whole.W_dec[own])
        assert torch.equal(part.W_enc, whole.W_enc[own])


@pytest.mark.parametrize(
    ("changes", "dictionary", "message"),
    [
        ({}, 5, r"^it: n_latents = 48 cannot be cut into 5 equal shards$"),
        ({"activation": {"kind": "topk", "k": 20}}, 4, r"^it: k is larger than a shard of 12 latents; take fewer"),
        ({"activation": {"kind": "gated"}}, 2, r"^it: gated latents cannot be cut into shards; allowed with parallel"),
        ({"activation": {"kind": "jumprelu", "keep_max": True}}, 2, r"^it: jumprelu \(keep_max\) latents cannot be"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes: dict[str, Any], dictionary: int, message: str) -> None:
    """Before any row is read."""
    with pytest.raises(ConfigError, match=message):
        shard_of(config(**changes), dictionary)


@pytest.mark.parametrize(
    ("coder", "optim", "data", "dictionary", "message"),
    [
        ({}, {"optimiser": "muon"}, 1, 2, r"^it: muon looks at whole matrices, and parallel\.dictionary cuts them"),
        ({}, {"prefixes": (8,)}, 1, 2, r"^it: nested prefixes cannot be cut into shards; use parallel\.dictionary 1$"),
        ({"activation": {"kind": "gated"}}, {}, 2, 1, r"^it: the term gate is not trained on a mesh; allowed: mse, "),
        ({}, {"batch": 33}, 2, 1, r"^it: a batch of 33 cannot be cut into 2 equal slices$"),
        ({}, {"held_out": 64}, 2, 1, r"^it: train\.held_out: rows are held out by one process; leave it 0 on a mesh$"),
        ({}, {"resample": (0.5,)}, 1, 2, r"^it: train\.resample: dead latents are begun anew by one process; leave it"),
        ({}, {"start_from": "x"}, 2, 1, r"^it: train\.start_from: one process goes on from a coder; leave it out"),
        ({}, {"k_start": 40}, 1, 2, r"^it: k_start is larger than a shard of 24 latents; take fewer shards$"),
        (
            {"activation": {"kind": "matching_pursuit"}},
            {},
            2,
            1,
            "^it: matching_pursuit coders are not trained",
        ),
    ],
)
def test_what_is_not_trained_on_a_mesh_is_refused(
    tmp_path: Path, coder: dict[str, Any], optim: dict[str, Any], data: int, dictionary: int, message: str
) -> None:
    """With what would be."""
    source = TensorSource(planted(400, 8, 12, 2)[0])
    job = Job(config(**coder), OptimConfig.model_validate({"batch": 32, "tokens": 96, "init_rows": 64, **optim}))
    mesh = ThreadMesh(0, data, dictionary)
    with pytest.raises(ConfigError, match=message):
        if "batch" in optim:
            MeshTrainer({"it": job}, RowFeed(source), tmp_path, "key", mesh)
        else:
            ShardLearner.first(job.coder, source, job.config, 3, mesh)


class _Quiet(ThreadMesh):
    """A mesh of one rank that speaks to nobody."""

    def tell(self, word: str) -> str:
        """Its own word."""
        return word

    def agree(self, problem: str | None) -> None:
        """With itself."""
        assert problem is None


def test_a_checkpoint_of_another_mesh_is_refused(tmp_path: Path) -> None:
    """With both meshes in the message; of its own it is read."""
    source = TensorSource(planted(400, 8, 12, 2)[0])
    mesh = _Quiet(0, 1, 1)
    learner = ShardLearner.first(config(), source, OptimConfig(batch=32, tokens=96, init_rows=64), 3, mesh)
    save_mesh(tmp_path / "c", "key", {"it": (learner.coder, learner.optimiser, learner.state)}, {}, mesh)
    again = load_mesh(tmp_path / "c", "key", {}, mesh)
    assert again is not None
    assert torch.equal(again["it"].tensors["coder.W_enc"], learner.coder.W_enc)
    with pytest.raises(ResumeError, match=r"c: was made on a mesh of data 1 × dictionary 1, this is a mesh of data 2"):
        load_mesh(tmp_path / "c", "key", {}, _Quiet(0, 2, 1))
    with pytest.raises(ResumeError, match="was made by another training config or data"):
        load_mesh(tmp_path / "c", "other", {}, mesh)


def test_a_mesh_of_the_wrong_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, and without it."""
    with pytest.raises(ConfigError, match=r"a mesh of data 3 × dictionary 2 needs 6 processes, torchrun started 4$"):
        Mesh(Team(torch.distributed.HashStore(), 0, 4), ParallelConfig(data=3, dictionary=2))
    monkeypatch.delenv("RANK", raising=False)
    assert join(ParallelConfig()) is None
    with pytest.raises(ConfigError, match=r"needs 2 processes, this is one; start it as torchrun --nproc-per-node 2"):
        join(ParallelConfig(dictionary=2))
