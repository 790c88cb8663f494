"""The plain twins, which need neither card nor Triton, and what the package does without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from unmix.coder.activations.selection import top_lowest
from unmix.coder.kernels import plain
from unmix.coder.kernels.rules import TopRule


@pytest.mark.parametrize(
    "rule", [TopRule(3), TopRule(40), TopRule(3, magnitude=True), TopRule(3, positive=True)], ids=str
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_running_top_k_is_that_of_all(rule: TopRule, whole: bool) -> None:
    """However latents are cut into runs, ties across runs included (whole numbers make many)."""
    draw = (
        (lambda *shape: torch.randint(-2, 3, shape).double())
        if whole
        else (lambda *shape: torch.randn(*shape).double())
    )
    x, W, b, scale = draw(11, 5), draw(50, 5), draw(50), torch.rand(50).double() + 0.5
    z = x @ W.T + b
    for factor in (None, scale):
        ids = top_lowest(rule.gate(z, factor), rule.k)
        for chunk in (1, 7, 64):
            found, values = plain.top(x, W, b, factor, rule, chunk)
            assert torch.equal(found, ids)
            torch.testing.assert_close(values, z.gather(1, ids))


def test_what_lies_above_a_floor() -> None:
    """In order of tokens and latents, however latents are cut."""
    x, W, b, floor = torch.randn(6, 5), torch.randn(50, 5), torch.randn(50), torch.rand(50)
    z = x @ W.T + b
    for chunk in (7, 64):
        found = plain.above(x, W, b, None, floor, chunk=chunk)
        assert found.offsets.diff().tolist() == (z > floor).sum(1).tolist()
        assert found.indices.tolist() == (z > floor).nonzero()[:, 1].tolist()
        torch.testing.assert_close(found.z, z[z > floor])


def test_low_precision_is_summed_in_float32() -> None:
    """The product is not rounded back."""
    x, W = torch.randn(3, 40).bfloat16(), torch.randn(4, 40).bfloat16()
    found = plain.product(x, W)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ W.double().T, rtol=1e-5, atol=1e-5)


def test_nothing_imports_triton_before_a_kernel_is_launched() -> None:
    """It is an extra: all but the kernels themselves are imported and typed without it."""
    names = ("adam", "decode", "encode", "fused", "gradients", "launching", "pairs", "plain", "rules")
    hidden = "import sys; sys.modules['triton'] = None; "
    script = hidden + "; ".join(f"import unmix.coder.kernels.{name}" for name in names)
    subprocess.run([sys.executable, "-c", script], check=True)
