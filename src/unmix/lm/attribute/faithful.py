"""Running the model with some nodes at their baselines: how much of a behaviour a circuit carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.lm.attribute.baselines import Nodes
from unmix.lm.attribute.circuits import Node, Positions, node_keys
from unmix.lm.attribute.targets import Metric
from unmix.lm.attribute.wiring import Wiring, at_keys, keys_of, score, union
from unmix.lm.splice import Binding


class Judge:
    """Faithfulness and completeness of sets of nodes, on the contexts of one `Nodes`.

    In a pass with nodes ablated, those that stay are what the coders find there then, not what they were without the
    ablation; the error that stays is what the coders leave over there.
    """

    def __init__(self, wiring: Wiring, tokens: Tensor, metric: Metric, nodes: Nodes, positions: Positions) -> None:
        self.wiring, self.tokens, self.metric = wiring, tokens, metric
        self.nodes = nodes
        self.positions: Positions = positions
        self.value = float(nodes.metric.double().mean())
        self.empty = self.measure((), False)

    def both(self, circuit: Sequence[Node]) -> tuple[float, float]:
        """(faithfulness, completeness); NaN where the empty circuit does what the model does."""
        whole = self.value - self.empty
        if whole == 0:
            return float("nan"), float("nan")
        inside, outside = self.measure(circuit, False), self.measure(circuit, True)
        return (inside - self.empty) / whole, (outside - self.empty) / whole

    def measure(self, circuit: Sequence[Node], outside: bool) -> float:
        """The metric, mean over contexts, with only the nodes of `circuit` left (`outside`: only the others)."""
        kept = _Kept(self, circuit, outside)
        rows = torch.arange(len(self.tokens))
        with torch.no_grad():
            value = score(
                self.wiring, self.tokens, self.metric, rows,
                lambda p: self.wiring.attach(p, self.tokens, kept.encode, kept.write),
            )  # fmt: skip
        return float(value.double().mean())


class _Kept:
    """The rules of one pass."""

    def __init__(self, judge: Judge, circuit: Sequence[Node], outside: bool) -> None:
        self.judge, self.outside = judge, outside
        self.whole: dict[str, list[Tensor]] = {}
        device = judge.tokens.device
        self.latents: dict[str, Tensor] = {}
        for name, codes in judge.nodes.codes.items():
            keys = [
                (node.position or 0) * codes.n_latents + (node.latent or 0)
                for node in circuit if node.source == name and node.latent is not None
            ]  # fmt: skip
            self.latents[name] = torch.tensor(keys, dtype=torch.int64, device=device)
        self.errors: dict[str, Tensor] = {}
        for hook in judge.nodes.errors:
            places = [node.position for node in circuit if node.source == hook and node.latent is None]
            held = torch.zeros(judge.tokens.shape[1], dtype=torch.bool, device=device)
            for place in places:
                held[slice(None) if place is None else place] = True
            self.errors[hook] = ~held if outside else held

    def encode(self, binding: Binding, x: Tensor) -> Codes:
        nodes, name = self.judge.nodes, binding.name
        current = binding.coder.encode(x)
        if nodes.errors:
            self.whole[name] = list(binding.coder.decode(current).split(binding.widths, dim=-1))
        base = replace(nodes.codes[name], values=nodes.bases[name], context=current.context)
        both, bases = union(current, base)
        keys = node_keys(
            both.token_rows(), both.indices.long(), self.judge.tokens.shape[1], both.n_latents, self.judge.positions
        )
        stays = torch.isin(keys, self.latents[name]) != self.outside
        return replace(both, values=torch.where(stays, at_keys(current, keys_of(both)), bases))

    def write(self, hook: str, x: Tensor, y: Tensor) -> Tensor:
        if hook not in self.errors:
            return y
        explained = [self.whole[binding.name][index] for binding, index in self.judge.wiring.writers[hook]]
        error = x.to(y.dtype) - torch.stack(explained).sum(0)
        return y + torch.where(self.errors[hook][:, None], error, self.judge.nodes.error_bases[hook])
