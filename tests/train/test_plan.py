"""The arithmetic of a plan against figures worked out by hand."""

from __future__ import annotations

import pytest

from unmix.coder import sparse
from unmix.train.plan import (
    DEVICES,
    Device,
    Layout,
    PlanConfig,
    Shape,
    make_plan,
    rank_memory,
    rank_weights,
    smallest_mesh,
    step_messages,
    step_phases,
    tile_rows,
)

ROUND = Device(memory=1e6, float32=1e6, tf32=4e6, bfloat16=1e7, bandwidth=1e6, link=1e5, network=1e4)
TOPK = Shape("a", d_in=10, d_out=10, n_latents=100, kind="topk", l0=4)


def layout(data: int = 1, dictionary: int = 1, per_node: int = 8, batch: int = 40) -> Layout:
    """40 tokens on round cards."""
    return Layout(data, dictionary, per_node, ROUND, batch)


def test_weights_of_a_rank() -> None:
    """100 rows of 10 + 10 + 1, and b_dec; half of the rows on two ranks; bias, skip and thresholds where they are."""
    assert rank_weights(TOPK, layout()) == 100 * 21 + 10
    assert rank_weights(TOPK, layout(dictionary=2)) == 50 * 21 + 10
    other = Shape("b", d_in=10, d_out=5, n_latents=100, kind="jumprelu", l0=4, own_bias=True, skip=True)
    assert rank_weights(other, layout()) == 100 * 17 + 5 + 10 + 50


def test_memory_of_a_rank() -> None:
    """Alone, on two shards with AuxK, and of two coders of which one works at a time."""
    config = PlanConfig(dead=0.5)
    alone = rank_memory([TOPK], layout(), config)
    assert alone == {
        "weights": 8440, "gradients": 8440, "optimiser": 16880,
        "activations": 40 * 50 * 4, "candidates": 32 * 40 * 4, "scores": tile_rows(100) * 400, "auxk": 0,
    }  # fmt: skip
    with_aux = Shape("a", 10, 10, 100, "topk", 4, "signum", k_aux=6)
    halved = rank_memory([with_aux], layout(dictionary=2), config)
    assert halved["optimiser"] == 4 * 1060
    assert halved["candidates"] == 40 * 4 * (8 + 10) + 32 * 80
    assert halved["auxk"] == (2 * 25 * 20 + 50 * 10) * 4 + 40 * 6 * 10
    both = rank_memory([TOPK, with_aux], layout(dictionary=2), config)
    assert both["weights"] == 2 * 1060 * 4
    assert both["auxk"] == halved["auxk"]


def test_messages_of_a_step() -> None:
    """Four ranks a ring: three hops of gates, and 3/4 of a sum twice."""
    found = {m.what: m for m in step_messages(TOPK, layout(dictionary=4), 0.0)}
    assert found["gates of candidates"].sent == 3 * 40 * 4 * 4
    assert found["partial reconstructions"].sent == 1.5 * 40 * 10 * 4
    assert set(found) == {"gates of candidates", "partial reconstructions", "biases and counts", "flags and figures"}
    data = {m.what: m for m in step_messages(TOPK, layout(data=2), 0.0)}
    assert data["gradients"].sent == 1.0 * 2110 * 4
    assert "partial reconstructions" not in data
    assert step_messages(TOPK, layout(), 0.1) == []
    relu = [m.what for m in step_messages(Shape("r", 10, 10, 100, "relu", 4), layout(dictionary=2), 0.0)]
    assert "gates of candidates" not in relu
    batch = {m.what: m for m in step_messages(Shape("b", 10, 10, 100, "batchtopk", 4), layout(dictionary=2), 0.0)}
    assert batch["counts of gates"].sent == 2 * 65536 * 8
    aux = {m.what: m for m in step_messages(Shape("a", 10, 10, 100, "topk", 4, k_aux=6), layout(dictionary=2), 0.05)}
    assert aux["gates of dead candidates"].sent == 40 * 5 * 4


def test_an_axis_that_leaves_the_machine_takes_the_network() -> None:
    """Neighbours along the dictionary stay together as long as they can."""
    assert layout(2, 4, per_node=4).speed("dictionary") == 1e5
    assert layout(2, 4, per_node=4).speed("data") == 1e4
    assert layout(2, 4, per_node=8).speed("data") == 1e5
    assert layout(1, 8, per_node=4).speed("dictionary") == 1e4


def test_phases_of_a_step() -> None:
    """Each the longer of its operations and its bytes."""
    config = PlanConfig(dead=0.5, latency=1e-3)
    found = {p.what: p for p in step_phases(TOPK, layout(dictionary=2, batch=400), config)}
    product = found["encoder product"]
    assert (product.flops, product.moved) == (2 * 400 * 50 * 10, 50 * 10 * 4)
    assert product.seconds == pytest.approx(0.4)
    assert found["scores and selection"].seconds == pytest.approx(5 * 400 * 50 * 4 / 1e6)
    assert found["codes and their gradients"].moved == (800 * 40 + 50 * 20) * 4
    assert found["optimiser"].moved == (1060 * 10 + 8 * 50 * 10) * 4
    sent = 400 * 4 * 4 + 400 * 10 * 4 + (10 + 10) * 4 + 40
    assert found["messages"].seconds == pytest.approx(sent / 1e5 + (1 + 1 + 4 + 3) * 1e-3)
    assert "AuxK" not in found
    faster = {p.what: p for p in step_phases(TOPK, layout(), PlanConfig(precision="bfloat16"))}
    assert faster["encoder product"].seconds == pytest.approx(2 * 40 * 1000 / 1e7)
    assert "messages" not in faster
    tiled = {p.what: p for p in step_phases(TOPK, layout(batch=400), PlanConfig(tile=400 * 100))}
    assert tiled["encoder product"].moved == 4 * 1000 * 4


def test_the_whole_training() -> None:
    """1,000 tokens twice in steps of 40; every step at half of the peaks."""
    config = PlanConfig(gpus=2, efficiency=0.5, price=3, model_parameters=5000, latency=1e-3)
    plan = make_plan([TOPK], layout(dictionary=2), config, 1000, 2, 10)
    assert plan.steps == 50
    assert plan.seconds == pytest.approx(sum(p.seconds for p in plan.phases))
    assert plan.bound == pytest.approx(40 / plan.seconds)
    assert plan.hours == pytest.approx(50 * plan.seconds * 2 / 3600)
    assert plan.cost == pytest.approx(plan.hours * 2 * 3)
    assert plan.capture_hours == pytest.approx(2 * 5000 * 1000 / 5e6 / 3600)
    assert (plan.cache, plan.coder, plan.checkpoint) == (20_000, 2110 * 4, 2110 * 12)
    assert plan.used == sum(plan.memory.values())
    assert not plan.fits


def test_the_smallest_mesh_that_fits() -> None:
    """As few slices of the dictionary as the card allows; all of them where none does."""
    config = PlanConfig(gpus=8, gpu="h100", dead=0)
    small = Shape("s", 1000, 1000, 2**16, "topk", 32)
    assert (smallest_mesh([small], 4096, config).data, smallest_mesh([small], 4096, config).dictionary) == (8, 1)
    large = Shape("l", 4096, 4096, 2**20, "topk", 32)
    chosen = smallest_mesh([large], 4096, config)
    assert (chosen.data, chosen.dictionary) == (4, 2)
    assert 2**20 * 8192 * 16 / 2 < 0.9 * DEVICES["h100"].memory < 2**20 * 8192 * 16
    huge = Shape("h", 4096, 4096, 2**26, "topk", 32)
    assert smallest_mesh([huge], 4096, config).dictionary == 8


def test_tiles_are_the_trainers() -> None:
    """The plan imports no torch, so it has the rule written down once more."""
    for latents in (100, 4096, 131_072, 2**18, 2**22):
        assert tile_rows(latents) == sparse.tile_rows(latents, 4)
