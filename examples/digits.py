"""Sparse coders on the hidden layers of a small network: handwritten digits in, latents out.

Trains a two-layer MLP on scikit-learn's digits (1,797 images of 8 × 8 pixels that come with the library), then a coder
on each hidden layer with `unmix.train_on`, and shows what some latents fire on. Under a minute on one core.

    pip install 'unmix[examples]'
    python examples/digits.py [--folder runs/digits]

With a folder, a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import unmix

HOOKS = ("1", "3")
"""The outputs of the two ReLUs."""
TOP = 40
"""Images that a latent is judged by: those that it fires on most strongly."""


@dataclass(frozen=True)
class Digits:
    """Images [n, 64] in 0 … 1 and their digits [n]."""

    images: Tensor
    labels: Tensor


def load_digits() -> tuple[Digits, Digits]:
    """Training and held-out images: a fixed shuffle, one in five held out."""
    try:
        from sklearn import datasets
    except ImportError:
        raise SystemExit("examples/digits.py needs the package scikit-learn: pip install 'unmix[examples]'") from None
    found = datasets.load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(found.target, dtype=torch.int64)[order]
    held_out = len(order) // 5
    return Digits(images[held_out:], labels[held_out:]), Digits(images[:held_out], labels[:held_out])


def train_network(digits: Digits, steps: int = 1500) -> nn.Sequential:
    """64 → 128 → 64 → 10, trained on random batches with Adam."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(steps):
        ids = torch.randint(len(digits.labels), (128,))
        loss = functional.cross_entropy(network(digits.images[ids]), digits.labels[ids])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network


def train_coders(network: nn.Module, digits: Digits, folder: str | None, epochs: int) -> dict[str, unmix.SparseCoder]:
    """A TopK coder on each hidden layer. Batches are (image, label) pairs, so `inputs` says which part goes in."""
    batches = list(zip(digits.images.split(128), digits.labels.split(128), strict=True))
    found = unmix.train_on(
        network,
        batches,
        hook=HOOKS,
        inputs=lambda batch: batch[0],
        coder={"n_latents": 128, "k": 8},
        # The set is small: a latent that was silent for one epoch counts as dead and is brought back by AuxK.
        train={"batch": 256, "epochs": epochs, "lr": 2e-3, "dead_after": 1500},
        folder=folder,
    )
    assert isinstance(found, dict)
    return found


@dataclass(frozen=True)
class Judged:
    """The digit that a latent fires on most, its share among the strongest images, and images it fires on at all."""

    digit: int
    purity: float
    fires: int


@torch.no_grad()
def report(network: nn.Sequential, hook: str, coder: unmix.SparseCoder, digits: Digits) -> list[str]:
    """Figures on held-out images, and for each digit the latent that is purest in it."""
    x = network[: int(hook) + 1](digits.images)
    out = coder(x)
    fvu = float((x - out.reconstruction).square().sum() / (x - x.mean(0)).square().sum())
    codes = out.codes.dense()
    spliced = float((network[int(hook) + 1 :](out.reconstruction).argmax(-1) == digits.labels).float().mean())
    lines = [
        f"layer {hook}: FVU {fvu:.3f}, L0 {float((codes != 0).sum(-1).float().mean()):.1f}, "
        f"{int((codes != 0).any(0).sum())} of {codes.shape[1]} latents fire, "
        f"{spliced:.1%} of digits right with the reconstruction spliced in"
    ]
    judged = {i: found for i in range(codes.shape[1]) if (found := judge(codes[:, i], digits.labels)) is not None}
    mean = sum(found.purity for found in judged.values()) / max(1, len(judged))
    lines.append(f"  mean digit purity of the {len(judged)} latents that fire on ten images or more: {mean:.2f}")
    for digit in range(10):
        of_digit = [(found.purity, found.fires, latent) for latent, found in judged.items() if found.digit == digit]
        if of_digit:
            purity, fires, latent = max(of_digit)
            lines.append(
                f"  {digit}: latent {latent:3d} fires on {fires:3d} images; {purity:.0%} of its strongest are {digit}"
            )
    return lines


def judge(activation: Tensor, labels: Tensor) -> Judged | None:
    """What one latent is about; None where it fires on fewer than ten images."""
    fires = int((activation != 0).sum())
    if fires < 10:
        return None
    top = labels[activation.topk(min(TOP, fires)).indices]
    digit = int(top.bincount().argmax())
    return Judged(digit, float((top == digit).float().mean()), fires)


def main(arguments: Sequence[str]) -> None:
    """Train, then print."""
    parser = argparse.ArgumentParser(description="Sparse coders on an MLP that reads digits.")
    parser.add_argument("--folder", help="keep rows, checkpoints and coders here")
    parser.add_argument("--epochs", type=int, default=100, help="passes of the coders over the activations")
    options = parser.parse_args(arguments)
    seen, held_out = load_digits()
    network = train_network(seen)
    right = float((network(held_out.images).argmax(-1) == held_out.labels).float().mean())
    sys.stdout.write(f"network: {right:.1%} of held-out digits right\n")
    coders = train_coders(network, seen, options.folder, options.epochs)
    for hook, coder in coders.items():
        sys.stdout.write("\n".join(report(network, hook, coder, held_out)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
