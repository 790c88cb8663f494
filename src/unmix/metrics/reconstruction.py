"""How close reconstructions come to activations.

With e = x − x̂ and x̄ the mean over the whole evaluation set:
fvu = Σ‖e‖² / Σ‖x − x̄‖², explained_variance = 1 − fvu, nmse = Σ‖e‖² / Σ‖x‖², cosine = mean cos(x, x̂),
l2_ratio = mean ‖x̂‖/‖x‖, relative_reconstruction_bias = E‖x̂‖² / E[x·x̂] (Rajamanoharan et al. 2024,
arXiv 2404.16014 §4), explained_variance_per_token = mean of 1 − ‖e‖²/‖x − x̄‖² (legacy; needs x̄ beforehand).

The variance is streamed about a shift c near the mean: Σ‖x − x̄‖² = Σ‖x − c‖² − ‖Σ(x − c)‖²/n. That is exact
for any c, and stable because c lies within a fraction of a standard deviation of x̄: no digits cancel, even
where the mean is a thousand times the spread. Welford's update would be as stable but is sequential.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vecdot

from unmix.core.errors import ConfigError
from unmix.metrics.context_sums import ContextSums, double, one_context, require_finite
from unmix.metrics.intervals import Estimate, bootstrap, finite_or_none

_SCALARS = (
    "tokens", "nonzero", "off_centre", "error2", "x2", "shifted2", "xhat2", "dot", "cosine", "ratio", "ev_token",
)  # fmt: skip
_AT = {name: i for i, name in enumerate(_SCALARS)}


class Reconstruction:
    """Streaming reconstruction metrics of one coder.

    `centre` [d] is the mean of the whole set where it is known beforehand; only then is
    `explained_variance_per_token` reported. Costs 8·(d + 11) bytes a context.
    """

    def __init__(self, centre: Float[Tensor, " d"] | None = None) -> None:
        self._known_centre = centre is not None
        self._shift = None if centre is None else double(centre).cpu()
        self._sums: ContextSums | None = None

    def update(
        self,
        x: Float[Tensor, "tokens d"],
        reconstruction: Float[Tensor, "tokens d"],
        contexts: Int[Tensor, " tokens"] | None = None,
    ) -> None:
        """Add a batch. `contexts` holds the id of each row's sequence. Raises `NonFiniteError` on NaN or inf."""
        if x.shape != reconstruction.shape:
            raise ConfigError(
                f"reconstruction: x is {list(x.shape)} but its reconstruction is {list(reconstruction.shape)}"
            )
        if len(x) == 0:
            return
        contexts = one_context(len(x), contexts)
        target, guess = double(x), double(reconstruction)
        x2, xhat2 = vecdot(target, target), vecdot(guess, guess)
        # A row's square is finite where the row is; float64 squares of float32 never overflow.
        if not bool(torch.isfinite(x2).all() & torch.isfinite(xhat2).all()):
            require_finite(target, "reconstruction", "x", contexts)
            require_finite(guess, "reconstruction", "the reconstruction", contexts)
        sums = self._open(target)
        shift = self._shift
        assert shift is not None
        shifted = target - shift.to(target.device)
        scalars = _token_scalars(target, guess, shifted, x2, xhat2)
        sums.add(contexts, torch.cat([scalars, shifted], dim=-1))

    def _open(self, x: Tensor) -> ContextSums:
        """The table, made on the first batch; its shift is that batch's mean unless a centre was given."""
        if self._shift is None:
            self._shift = x.mean(0).cpu()
        if len(self._shift) != x.shape[-1]:
            raise ConfigError(f"reconstruction: width {x.shape[-1]}, earlier batches had {len(self._shift)}")
        if self._sums is None:
            self._sums = ContextSums([*_SCALARS, *(f"x{i}" for i in range(x.shape[-1]))])
        return self._sums

    def merge(self, other: Reconstruction) -> None:
        """Add what `other` has seen. Both must have been made with the same `centre`, or both without one."""
        if other._sums is None or other._shift is None:
            return
        if self._known_centre != other._known_centre or (
            self._known_centre and self._shift is not None and not torch.equal(self._shift, other._shift)
        ):
            raise ConfigError("reconstruction: cannot merge sums that were taken about different given centres")
        if self._sums is None or self._shift is None:
            self._shift = other._shift
            self._sums = ContextSums(other._sums.columns)
        if len(self._shift) != len(other._shift):
            raise ConfigError(f"reconstruction: widths {len(self._shift)} and {len(other._shift)} do not merge")
        self._sums.merge(_moved(other._sums, other._shift - self._shift))

    @property
    def n_tokens(self) -> int:
        """Rows seen."""
        return 0 if self._sums is None else int(self._sums.totals()[_AT["tokens"]])

    def result(self) -> dict[str, float | None]:
        """Each metric over everything seen; `None` where undefined (constant x, or nothing seen)."""
        if self._sums is None:
            return {}
        return {name: finite_or_none(v) for name, v in self._finish(self._sums.totals()).items()}

    def intervals(self, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> dict[str, Estimate]:
        """Each metric with its bootstrap interval over contexts."""
        if self._sums is None:
            return {}
        return bootstrap(self._sums.table(), self._finish, seed=seed, resamples=resamples, level=level)

    def _finish(self, sums: Tensor) -> dict[str, Tensor]:
        column = {name: sums[..., i] for name, i in _AT.items()}
        drift = sums[..., len(_SCALARS) :].square().sum(-1) / column["tokens"]
        variance = column["shifted2"] - drift
        # What cancellation leaves of a zero variance is not a variance.
        variance = torch.where(variance <= 1e-13 * column["shifted2"], 0.0, variance)
        fvu = column["error2"] / variance
        metrics = {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "nmse": column["error2"] / column["x2"],
            "cosine": column["cosine"] / column["nonzero"],
            "l2_ratio": column["ratio"] / column["nonzero"],
            "relative_reconstruction_bias": column["xhat2"] / column["dot"],
        }
        if self._known_centre:
            metrics["explained_variance_per_token"] = column["ev_token"] / column["off_centre"]
        return metrics


def _token_scalars(x: Tensor, xhat: Tensor, shifted: Tensor, x2: Tensor, xhat2: Tensor) -> Tensor:
    """[tokens, 11], in the order of `_SCALARS`. Tokens with x = 0 have no direction and no ratio: not counted."""
    error = x - xhat
    dot, error2, shifted2 = vecdot(x, xhat), vecdot(error, error), vecdot(shifted, shifted)
    nonzero, off_centre = x2 > 0, shifted2 > 0
    both = nonzero & (xhat2 > 0)
    # sqrt before the product: x2·xhat2 of small vectors underflows.
    cosine = torch.where(both, dot / (x2.sqrt() * xhat2.sqrt()), 0.0)
    ratio = torch.where(nonzero, (xhat2.sqrt() / x2.sqrt()), 0.0)
    ev_token = torch.where(off_centre, 1 - error2 / shifted2, 0.0)
    one = torch.ones_like(x2)
    return torch.stack(
        [one, nonzero.double(), off_centre.double(), error2, x2, shifted2, xhat2, dot, cosine, ratio, ev_token], -1
    )


def _moved(sums: ContextSums, step: Tensor) -> ContextSums:
    """The same sums taken about another shift: `step` = old shift − new shift, so x − new = (x − old) + step."""
    if not bool(step.any()):
        return sums
    table = sums.table().clone()
    tokens, vector = table[:, _AT["tokens"]], table[:, len(_SCALARS) :]
    table[:, _AT["shifted2"]] += 2 * (vector @ step) + tokens * step.square().sum()
    table[:, len(_SCALARS) :] += tokens[:, None] * step
    moved = ContextSums(sums.columns)
    moved.add(torch.tensor(sums.ids), table)
    return moved
