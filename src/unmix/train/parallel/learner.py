"""One slice of a coder under training, in step with the other slices and with the other slices of the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.encoder import AffineEncoder
from unmix.coder.sparse import sparse_decode
from unmix.coder.sparse_coder import SparseCoder
from unmix.train.checkpoint import Saved, TrainState, restore
from unmix.train.config import OptimConfig
from unmix.train.guard import bad_rows, finite
from unmix.train.initialise import initialise
from unmix.train.learner import Learner, StepMetrics, fit_length, project_decoder_gradient
from unmix.train.objectives import Step
from unmix.train.parallel.autograd import summed
from unmix.train.parallel.checks import require_on_mesh
from unmix.train.parallel.encoder import ShardEncoder
from unmix.train.parallel.mesh import Mesh
from unmix.train.parallel.shard import draw_weights, is_sharded, shard_of
from unmix.train.parallel.terms import shared_terms
from unmix.train.source import ActivationSource
from unmix.train.spaces import inner_target


class ShardLearner(Learner):
    """A learner whose loss, gradients, counters and figures are those of the whole batch and the whole coder."""

    def __init__(
        self, coder: SparseCoder, state: TrainState, config: OptimConfig, whole: CoderConfig, steps: int, mesh: Mesh
    ) -> None:
        """`coder` is this rank's slice of the coder `whole`. `ConfigError` for what cannot be trained on a mesh."""
        require_on_mesh(whole.name, whole, config, mesh.data, mesh.dictionary)
        self.whole, self.mesh = whole, mesh
        state.tokens_since_fired = state.tokens_since_fired.to(mesh.device)
        super().__init__(coder.to(mesh.device), state, config, shared_terms(whole, config, mesh), steps)

    @classmethod
    def first(
        cls, config: CoderConfig, source: ActivationSource, optim: OptimConfig, steps: int, mesh: Mesh
    ) -> ShardLearner:
        """The slice of the first weights that one process would begin with. `config` is that of the whole coder."""
        coder, variance = initialise(shard_of(config, mesh.dictionary), source, optim)
        if mesh.dictionary > 1:
            draw_weights(coder, config, optim.seed, mesh)
        state = TrainState(0, torch.zeros(coder.n_latents, dtype=torch.int64), variance)
        learner = cls(coder, state, optim, config, steps, mesh)
        fit_length(learner, source)
        return learner

    @classmethod
    def again(cls, saved: Saved, config: CoderConfig, optim: OptimConfig, steps: int, mesh: Mesh) -> ShardLearner:
        """As this slice's checkpoint left it."""
        learner = cls(SparseCoder(saved.config), saved.state, optim, config, steps, mesh)
        restore(learner.coder, learner.optimiser, saved)
        return learner

    def forward(self, x: Tensor, target: Tensor) -> Step:
        """As the parent's; the reconstruction is the sum of what all slices decode."""
        coder, mesh = self.coder, self.mesh
        s, context = coder.prepare(x.to(mesh.device))
        codes = coder.encoder.codes(coder, s, None)
        part = sparse_decode(codes.values, coder.W_dec, codes.indices, codes.offsets)
        y = summed(part, mesh, "dictionary") + coder.b_dec
        if coder.config.skip:
            y = y + s @ coder.W_skip.T
        wanted = inner_target(coder.config, s, target.to(mesh.device), context)
        dead = (self.state.tokens_since_fired >= self.config.dead_after).nonzero().squeeze(-1)
        return Step(coder, s, wanted, codes, y, self.state.variance, dead, self.state.step / self.steps)

    def loss(self, batch: Step) -> tuple[Tensor, dict[str, float]]:
        """As the parent; where one rank's input is not finite, all raise the `FaultError`."""
        fine = finite(batch.x) and finite(batch.target)
        wrong = torch.tensor([not fine], dtype=torch.int64, device=self.mesh.device)
        if bool(self.mesh.max_(wrong, "all")):
            raise self._not_finite("input", math.nan, bad_rows(batch.x, batch.target))
        return super().loss(batch)

    @torch.no_grad()
    def clip(self) -> None:
        """Sum over the slices of the batch, then as the parent, by the norm of all slices' gradients together."""
        mesh, shares, whole = self.mesh, [], []
        for name, parameter in self.coder.named_parameters():
            if parameter.grad is None:
                continue
            mesh.sum_(parameter.grad, "data")
            if is_sharded(self.coder, name):
                shares.append(parameter.grad)
            else:
                whole.append(mesh.same_(parameter.grad))
        if self.unit_norm:
            project_decoder_gradient(self.coder)
        squares = mesh.sum_(_squares(shares, self.state.tokens_since_fired.device), "dictionary")
        norm = float((squares + _squares(whole, squares.device)).sqrt())
        if not math.isfinite(norm):
            raise self._not_finite("gradient's norm", norm)
        if self.config.clip:
            factor = min(1.0, self.config.clip / (norm + 1e-6))
            for grad in (*shares, *whole):
                grad.mul_(factor)

    def apply(self, batch: Step, loss: float, values: dict[str, float]) -> StepMetrics:
        """As the parent; figures are those of all ranks."""
        mesh = self.mesh
        found = super().apply(batch, loss, values)
        own = torch.tensor([found.l0, found.dead, found.fvu], dtype=torch.float64, device=mesh.device)
        l0, dead, fvu = (mesh.sum_(own, "all") / mesh.data).tolist()
        return replace(found, l0=l0, dead=round(dead), fvu=fvu / mesh.dictionary)

    def _anneal(self) -> None:
        super()._anneal()
        encoder = self.coder.encoder
        if isinstance(encoder, AffineEncoder):
            self.coder.encoder = ShardEncoder(encoder.config, self.whole, self.mesh)

    @torch.no_grad()
    def _count(self, batch: Step) -> None:
        mesh, counters = self.mesh, self.state.tokens_since_fired
        fired = torch.zeros_like(counters, dtype=torch.uint8)
        fired[batch.codes.indices[batch.codes.values.detach() != 0].long()] = 1
        mesh.max_(fired, "data")
        counters += batch.codes.rows * mesh.data
        counters[fired.bool()] = 0
        if self.coder.config.activation.kind == "batchtopk":
            move_threshold(self.coder, batch, mesh)
        self.state.step += 1
        self._anneal()


@torch.no_grad()
def move_threshold(coder: SparseCoder, batch: Step, mesh: Mesh, momentum: float = 0.99) -> None:
    """As `update_threshold`, by the smallest kept gate value of all ranks."""
    codes, scale = batch.codes, coder.gate_factor()
    gate = codes.values if scale is None else codes.values * scale[codes.indices.long()]
    smallest = mesh.min_(torch.cat([gate, gate.new_full((1,), torch.inf)]).min(), "all")
    if bool(torch.isfinite(smallest)):
        threshold = coder.extra()["threshold"]
        threshold.copy_(smallest if threshold < 0 else momentum * threshold + (1 - momentum) * smallest)


def _squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all entries, in double precision."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        total += grad.norm().double().square()
    return total
