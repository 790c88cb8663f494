"""The terms of an objective over all ranks: every rank holds the value of the whole batch and the whole dictionary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmix.coder.activations.selection import TopKSelector
from unmix.coder.config import CoderConfig
from unmix.coder.sparse import sparse_affine, sparse_decode
from unmix.train.config import OptimConfig, objective_of
from unmix.train.objectives import Step, Term, make_term
from unmix.train.objectives.auxk import AuxK
from unmix.train.objectives.specs import AuxKSpec, L0Spec, L1Spec, TermSpec
from unmix.train.parallel.autograd import summed
from unmix.train.parallel.checks import require_term
from unmix.train.parallel.mesh import Mesh
from unmix.train.parallel.selection import SharedTopK, best_of_all

BY_LATENT = (L1Spec, L0Spec)
"""Sums over latents: the slices' values add up."""


class Shared:
    """A mean over tokens, which may be a sum over latents, from every rank's own tokens and latents."""

    def __init__(self, term: Term, mesh: Mesh, spec: TermSpec | None = None) -> None:
        """`spec`: what it was asked for, where `term` is only a part of it."""
        self.name, self.spec = term.name, spec or term.spec
        self.term, self.mesh = term, mesh

    def __call__(self, step: Step) -> Tensor:
        """Scalar, the same on every rank."""
        value = summed(self.term(step), self.mesh, "data") / self.mesh.data
        return summed(value, self.mesh, "dictionary") if isinstance(self.spec, BY_LATENT) else value


class SharedTarget(Shared):
    """(L0 / target − 1)² of the whole batch's L0."""

    def __init__(self, spec: L0Spec, coder: CoderConfig, mesh: Mesh) -> None:
        plain = spec.model_copy(update={"form": "step", "target": None})
        super().__init__(make_term(plain, coder), mesh, spec)
        self.target = spec.target or 1.0

    def __call__(self, step: Step) -> Tensor:
        """Scalar, the same on every rank."""
        return (super().__call__(step) / self.target - 1).square()


class SharedAuxK(AuxK):
    """AuxK with the dead latents of all slices and the residuals of the whole batch."""

    def __init__(self, spec: AuxKSpec, coder: CoderConfig, mesh: Mesh) -> None:
        super().__init__(spec, coder)
        self.mesh = mesh

    def __call__(self, step: Step) -> Tensor:
        """Scalar, the same on every rank."""
        mesh, zero = self.mesh, step.reconstruction.new_zeros(())
        mine = torch.tensor([step.dead.numel()], device=zero.device)
        counts = [int(count) for count in mesh.gather(mine, "dictionary")]
        residual = (step.target - step.reconstruction).detach()
        centre = mesh.sum_(residual.mean(0), "data") / mesh.data
        spread = mesh.sum_((residual - centre).square().sum(), "data")
        if sum(counts) == 0 or not bool(spread > 0):
            return zero
        k = min(self.k_aux, sum(counts))
        guess = summed(self._guess(step, k, min(k, max(counts))), mesh, "dictionary")
        loss = summed((residual - guess).square().sum(), mesh, "data") / spread
        return torch.where(torch.isfinite(loss), loss, zero)

    def _guess(self, step: Step, k: int, columns: int) -> Tensor:
        """What the chosen dead latents of this slice add to the residual's reconstruction."""
        coder, dead, mesh = step.coder, step.dead, self.mesh
        if dead.numel() == 0:
            best_of_all(step.x.new_zeros(len(step.x), 0), k, columns, mesh)
            return torch.zeros_like(step.reconstruction)
        bias, scale = coder.input_bias(), coder.gate_factor()
        factor = None if scale is None else scale[dead]
        local = TopKSelector(min(k, dead.numel()))
        values, indices, offsets = sparse_affine(
            step.x, coder.W_enc[dead], coder.b_enc[dead], None if bias is None else bias.detach(), factor,
            local if mesh.dictionary == 1 else SharedTopK(local, k, columns, factor, mesh),
        )  # fmt: skip
        return sparse_decode(values.relu(), coder.W_dec[dead], indices, offsets)


def shared_terms(coder: CoderConfig, config: OptimConfig, mesh: Mesh) -> list[Term]:
    """The objective of a coder (the whole one) over a mesh. `ConfigError` for a term that is not known to be right."""
    return [_shared(spec, coder, mesh) for spec in objective_of(coder.activation.kind, config)]


def _shared(spec: TermSpec, coder: CoderConfig, mesh: Mesh) -> Term:
    require_term(coder.name, spec, mesh.dictionary)
    if isinstance(spec, AuxKSpec):
        made: Any = SharedAuxK(spec, coder, mesh)
        return made
    if isinstance(spec, L0Spec) and spec.form == "quadratic":
        return SharedTarget(spec, coder, mesh)
    return Shared(make_term(spec, coder), mesh)
