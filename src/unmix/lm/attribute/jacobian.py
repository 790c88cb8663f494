"""The Jacobian lens: the mean derivative of the stream after the last block with respect to a hook.

Where the logit lens pretends that the later blocks do nothing, this puts their average linear effect in their place:
logits of v ≈ W_U norm(J v), J = mean over positions t of Σ_{t' ≥ t} ∂h_last[t'] / ∂h[t] (`targets="later"`), or of
∂h_last[t] / ∂h[t] alone (`"same"`).

One row of J for all positions of a batch is one backward pass: the gradient of Σ_t' h_last[t', i]. For `"same"` each
target gets a random sign and each gradient that of its own position, so that what crosses positions averages out
(Hutchinson's trick); it is unbiased and needs more text. Rows are dealt out over the batches, so that much text costs
no more backward passes than little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmix.core.atomic import atomic_folder
from unmix.core.errors import ConfigError, CorruptError, ModelError, NonFiniteError
from unmix.core.manifest import refuse_foreign, require_whole, write_manifest
from unmix.core.policy import ModelFingerprint
from unmix.core.progress import task
from unmix.core.seeds import derive
from unmix.lm.contexts import Contexts, as_contexts, read_batch
from unmix.lm.forward import attach_read, attach_write, run
from unmix.lm.sites import Pass

if TYPE_CHECKING:
    from unmix.core.policy import InputPolicy
    from unmix.lm.model import LanguageModel

KIND = "jacobian-lens"
WEIGHTS = "lens.safetensors"
Targets = Literal["later", "same"]


@dataclass(frozen=True)
class JacobianLens:
    """A fitted lens. Vectors at `hook` go in, vectors of the stream after the last block come out."""

    hook: str
    jacobian: Tensor
    """[d_model, d_hook], float32."""
    model: ModelFingerprint
    targets: Targets
    tokens: int
    """Positions that were averaged over (of the row that saw fewest)."""

    def transport(self, v: Float[Tensor, "n d"]) -> Float[Tensor, "n d_model"]:
        """J v for each row."""
        return v.float() @ self.jacobian.to(v.device).T

    def check(self, lm: LanguageModel) -> None:
        """`ModelError` where the lens is another model's."""
        here = lm.fingerprint
        for part in ("family", "n_layers", "d_model", "weights_hash"):
            mine, other = getattr(self.model, part), getattr(here, part)
            if None not in (mine, other) and mine != other:
                raise ModelError(
                    f"the lens was fitted on {self.model.name} ({part} {mine}); {here.name} has {part} {other}"
                )

    def save(self, folder: str | Path) -> None:
        """Write `lens.safetensors` and a manifest, atomically; an older lens there is replaced."""
        refuse_foreign(folder, KIND)
        with atomic_folder(folder) as temp:
            save_file({"jacobian": self.jacobian.contiguous()}, temp / WEIGHTS)
            write_manifest(
                temp, KIND, hook=self.hook, targets=self.targets, tokens=self.tokens,
                model=self.model.model_dump(mode="json"),
            )  # fmt: skip

    @staticmethod
    def load(folder: str | Path) -> JacobianLens:
        """Read what `save` wrote; `CorruptError` where it is not whole."""
        folder = Path(folder)
        manifest = require_whole(folder, KIND, deep=True)
        try:
            tensor = load_file(folder / WEIGHTS)["jacobian"]
            return JacobianLens(
                str(manifest["hook"]), tensor, ModelFingerprint(**manifest["model"]), manifest["targets"],
                int(manifest["tokens"]),
            )  # fmt: skip
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{folder}: not a whole lens ({error})") from error


def fit_jacobian(
    lm: LanguageModel,
    hook: str,
    data: Contexts | Tensor,
    policy: InputPolicy,
    *,
    targets: str = "later",
    passes: int | None = 4,
    batch: int = 1,
    seed: int = 0,
) -> JacobianLens:
    """Fit a lens at `hook` on contexts, `batch` at a time; each row of J is the mean over `passes` of the batches.

    It takes d_model × `passes` backward passes of a batch, however many contexts there are; `None`: every row on every
    batch. Memory: the graph of one batch from the hook on, and two tensors of J's size. Positions that `policy` masks
    are no sources. Raises before any pass: `ModelError` for a hook that is not before the end of the stream or a model
    without blocks, `ConfigError` for settings; `NonFiniteError` where a gradient is not finite.
    """
    if targets not in ("later", "same"):
        raise ConfigError(f"targets is {targets!r}; allowed: later, same")
    place, width = lm.hook(hook), lm.width(hook)
    d = lm.d_model
    last = lm.hook(lm.last_hook)
    if place.name in (last.name, "final_norm"):
        raise ModelError(f"{hook}: there are no blocks after this; the logit lens is exact up to the last norm")
    if batch < 1 or (passes is not None and passes < 1):
        raise ConfigError(f"passes and batch must be at least 1, found {passes} and {batch}")
    contexts = as_contexts(data, policy)
    ids = contexts.contexts_of("evaluate")
    starts = range(0, len(ids), batch)
    total = torch.zeros(d, width, dtype=torch.float64)
    seen = torch.zeros(d, dtype=torch.int64)
    random = torch.Generator().manual_seed(derive(seed, "lens", place.name))
    dealt = _deal(d, len(starts), passes, random)
    with task("lens", len(starts), "batches") as bar:
        for start, chosen in zip(starts, dealt):
            part = read_batch(contexts, ids[start : start + batch])
            if len(chosen) and bool(part.mask.any()):
                total[chosen] += _rows(lm, place, last, part, chosen, _signs(part.tokens, targets, random))
                seen[chosen] += int(part.mask.sum())
            bar.advance(1)
    if int(seen.min()) == 0:
        raise ConfigError(f"{int((seen == 0).sum())} of {d} rows saw no position: give more contexts")
    jacobian = (total / seen[:, None]).float()
    if not bool(jacobian.isfinite().all()):
        raise NonFiniteError(f"{hook}: the mean Jacobian holds NaN or infinity; nothing was saved")
    kind: Targets = "same" if targets == "same" else "later"
    return JacobianLens(place.name, jacobian, lm.fingerprint, kind, int(seen.min()))


def _deal(d: int, batches: int, passes: int | None, random: torch.Generator) -> list[Tensor]:
    """Which rows each batch does: every row in `passes` different batches, batches as even as can be."""
    if passes is None or passes >= batches:
        return [torch.arange(d)] * batches
    first = torch.arange(d) * batches // d
    order = torch.randperm(d, generator=random)
    # Spread over the text: pass p of a row is in the batch p / passes of the way further on.
    owners = [(first + p * batches // passes) % batches for p in range(passes)]
    return [order[torch.stack([owner == b for owner in owners]).any(0)] for b in range(batches)]


def _signs(tokens: Tensor, targets: str, random: torch.Generator) -> Tensor:
    if targets == "later":
        return torch.ones(tokens.shape)
    return torch.randint(0, 2, tokens.shape, generator=random).float() * 2 - 1


def _rows(lm: LanguageModel, place: Any, last: Any, part: Any, chosen: Tensor, signs: Tensor) -> Tensor:
    """Sums over source positions of the chosen rows [n, d_hook], float64."""
    leaves: list[Tensor] = []
    ends: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[0]

    def prepare(current: Pass) -> None:
        attach_write(current, place, leaf)
        attach_read(current, last, ends.append)

    mask = part.mask.to(lm.device)
    signs = signs.to(lm.device)
    found = torch.zeros(len(chosen), lm.width(place.name), dtype=torch.float64)
    with torch.enable_grad():
        run(lm, part.tokens.to(lm.device), prepare, documents=part.documents, logits=False)
        targets = (ends[0] * signs[..., None].to(ends[0].dtype)).sum((0, 1))
        for index, row in enumerate(chosen.tolist()):
            (slope,) = torch.autograd.grad(targets[row], leaves, retain_graph=index + 1 < len(chosen))
            own = (slope.double() * signs[..., None])[mask]
            found[index] = own.sum(0).cpu()
    return found
