"""The affine encoder of one slice of latents, which fires what fires in the whole coder."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.codes import Codes
from unmix.coder.config import Activation, CoderConfig
from unmix.coder.encoder import AffineEncoder
from unmix.coder.sparse import sparse_affine
from unmix.coder.sparse_coder import SparseCoder
from unmix.train.parallel.autograd import spread
from unmix.train.parallel.mesh import Mesh
from unmix.train.parallel.selection import shared_selector


class ShardEncoder(AffineEncoder):
    """As its parent, with the selection over all ranks. Codes are over the slice's own latents."""

    def __init__(self, config: Activation, whole: CoderConfig, mesh: Mesh) -> None:
        """`config` is the activation of now, k-annealing included; `whole` the coder of all slices."""
        super().__init__(config)
        self.whole, self.mesh = whole, mesh

    def codes(self, coder: SparseCoder, x: Tensor, context: Tensor | None) -> Codes:
        """What this slice adds to the code of each token."""
        mesh, scale, bias, extra = self.mesh, coder.gate_factor(), coder.input_bias(), self.extra(coder)
        local = self.rule.selector(extra, x.shape[0] * mesh.data, coder.training)
        selector = shared_selector(local, self.whole.n_latents, scale, mesh)
        # Each slice sees the bias through its own latents, so its gradient is the sum over slices.
        shared = None if bias is None else spread(bias, mesh, "dictionary")
        z, indices, offsets = sparse_affine(x, coder.W_enc, coder.b_enc, shared, scale, selector)
        values = self.rule.values(z, indices, scale, extra)
        return Codes(indices, values, offsets, coder.n_latents, (x.shape[0],), selector.uniform_k)
