"""Direct logits of latents: what a latent adds to the logits without passing through any later block.

The *logit lens* of a latent is the same with the norm's scale left out; with a `JacobianLens` the later blocks count
too, on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError, ModelError
from unmix.lm.attribute.readout import Readout, Scales, measure_scales
from unmix.lm.forward import as_inputs
from unmix.lm.points import split_name
from unmix.lm.splice import Coder, make_bindings

if TYPE_CHECKING:
    from unmix.lm.attribute.jacobian import JacobianLens
    from unmix.lm.model import LanguageModel


@dataclass(frozen=True)
class TokenLogit:
    """A token and what a latent adds to its logit."""

    token: int
    string: str
    logit: float


@dataclass(frozen=True)
class LatentLogits:
    """Direct logits of some latents, each at an activation of 1."""

    latents: tuple[int, ...]
    logits: Tensor
    """[n, vocab], float32, before any soft cap."""
    scale: str
    """How the norms' scales were taken: left out, at a position, or as means."""
    cap: float | None
    """The family's soft cap, which would follow."""
    strings: Any = None
    """Ids to display strings, where the model has a tokenizer."""

    def top(self, n: int = 10, bottom: bool = False) -> list[list[TokenLogit]]:
        """For each latent its `n` tokens of the largest logits (`bottom`: the smallest), best first."""
        found = self.logits.topk(min(n, self.logits.shape[-1]), dim=-1, largest=not bottom)
        listed: list[list[TokenLogit]] = []
        for ids, values in zip(found.indices.tolist(), found.values.tolist()):
            names = [f"[{i}]" for i in ids] if self.strings is None else self.strings(ids)
            listed.append([TokenLogit(i, name, value) for i, name, value in zip(ids, names, values)])
        return listed

    def bottom(self, n: int = 10) -> list[list[TokenLogit]]:
        """For each latent its `n` tokens of the smallest logits, smallest first."""
        return self.top(n, bottom=True)

    def statistics(self) -> dict[str, Tensor]:
        """Shape of each latent's logits over the vocabulary [n]: mean, std, skewness, kurtosis (3 for a Gaussian).

        Skewed and heavy-tailed rows are those of latents that promote or suppress few tokens (Gurnee et al. 2024,
        arXiv 2401.12181).
        """
        x = self.logits.double()
        mean, std = x.mean(-1), x.std(-1, correction=0)
        z = (x - mean[:, None]) / std[:, None].clamp(min=1e-30)
        return {"mean": mean, "std": std, "skewness": (z**3).mean(-1), "kurtosis": (z**4).mean(-1)}


def direct_logits(
    lm: LanguageModel,
    coder: Coder,
    latents: int | Sequence[int],
    *,
    at: Any = None,
    position: int | None = None,
    lens: JacobianLens | None = None,
) -> LatentLogits:
    """What latents add to the logits, each at an activation of 1.

    The final norm's gain and centring are folded. Its scale is left out (1: logits are in units of it, and only their
    order and proportions mean something), or, with `at` (a text or token ids), taken at `position`, or as a mean over
    positions. Scales of norms behind a sublayer's raw output (Gemma 2/3, OLMo 2) are treated alike. A coder that
    normalises its input is read with a norm of 1 unless `at` and `position` are given. Soft caps come after: they keep
    the order and are not applied.

    A coder that writes several places adds up what it adds to the stream; of several states *of* the stream the last
    counts. With `lens`, the mean Jacobian stands in for the later blocks.

    Raises `ModelError`: latents out of range, a hook that writes nothing to the stream directly, a model whose head
    is not known.
    """
    ids = check_latents(coder, latents)
    (binding,) = make_bindings(lm, {"coder": coder})
    readout = Readout(lm)
    hooks = [hook.name for hook in binding.writes]
    tokens = None if at is None else as_inputs(lm, at, coder.config.input_policy)
    if tokens is not None and position is not None and not -tokens.shape[1] <= position < tokens.shape[1]:
        raise ModelError(f"position {position}: the prompt has {tokens.shape[1]} tokens")
    if tokens is None and position is not None:
        raise ConfigError("position is a place in `at`: give the text too")
    scales = {hook: Scales(1.0) for hook in hooks}
    if tokens is not None:
        scales = measure_scales(readout, hooks, tokens, position)
    rows = latent_rows(coder, ids, _context(lm, binding, tokens, position))
    final = next(iter(scales.values()))
    if any(split_name(hook)[0] == "final_norm" for hook in hooks):
        raise_for_lens(lens, hooks)
        logits = readout.head(rows[:, : lm.d_model])
    elif lens is not None:
        raise_for_lens(lens, hooks)
        logits = readout.logits(lens.transport(rows.to(lm.device)), final.final)
    else:
        logits = readout.logits(_stream(readout, binding, rows, scales), final.final)
    strings = lm.token_strings if lm.has_tokenizer else None
    return LatentLogits(tuple(ids), logits.cpu(), final.said, readout.cap, strings)


def raise_for_lens(lens: JacobianLens | None, hooks: Sequence[str]) -> None:
    """`ModelError` where a lens was fitted at another hook than the coder writes."""
    if lens is not None and list(hooks) != [lens.hook]:
        raise ModelError(f"the lens was fitted at {lens.hook}, the coder writes {', '.join(hooks)}")


def check_latents(coder: Coder, latents: int | Sequence[int]) -> list[int]:
    """Ids as a list; `ModelError` for one that the coder does not have."""
    ids = [latents] if isinstance(latents, int) else [int(i) for i in latents]
    n = coder.config.n_latents
    for i in ids:
        if not 0 <= i < n:
            raise ModelError(f"latent {i}: coder {coder.config.name!r} has latents 0 to {n - 1}")
    return ids


@torch.no_grad()
def latent_rows(coder: Coder, ids: Sequence[int], context: dict[str, Tensor] | None = None) -> Float[Tensor, "n d_out"]:
    """What one unit of each latent adds to the coder's output: decoder rows with every output scale applied.

    `context`: facts of one token that decoding needs (`mean`, `std` [1]); default: a norm of 1.
    """
    config = coder.config
    device = getattr(coder, "device", torch.device("cpu"))
    n = len(ids)
    given = context or {}
    sizes = {"mean": 1, "std": 1, "skip": config.d_in, "predicted": config.width_out}
    filled = {
        key: given.get(key, torch.full((1,), 1.0 if key == "std" else 0.0)).to(device).expand(n, size).float()
        for key, size in sizes.items()
        if key in ("skip", "predicted") or config.normalise.kind in ("layer_norm", "constant_norm")
    }
    if config.normalise.kind == "constant_norm":
        filled.pop("mean", None)
    codes = Codes(
        torch.tensor(list(ids), dtype=torch.int32, device=device), torch.ones(n, device=device),
        torch.arange(n + 1, device=device), config.n_latents, (n,), 1, filled,
    )  # fmt: skip
    return (coder.decode(codes) - coder.decode(replace(codes, values=torch.zeros(n, device=device)))).float()


def _stream(readout: Readout, binding: Any, rows: Tensor, scales: dict[str, Scales]) -> Tensor:
    """What the latents add to the stream [n, d_model]."""
    parts = rows.to(readout.lm.device).split(binding.widths, dim=-1)
    added: list[Tensor] = []
    states: list[Tensor] = []
    for hook, part in zip(binding.writes, parts):
        found = readout.to_stream(hook.name, part, scales[hook.name].inner)
        (states if split_name(hook.name)[0].startswith("resid") else added).append(found)
    return torch.stack([*added, *states[-1:]]).sum(0)


def _context(lm: LanguageModel, binding: Any, tokens: Tensor | None, position: int | None) -> dict[str, Tensor]:
    """Mean and std of the coder's input at the position, where it normalises."""
    coder = binding.coder
    if tokens is None or position is None or coder.config.normalise.kind not in ("layer_norm", "constant_norm"):
        return {}
    reads = [hook.name for hook in binding.reads]
    found = lm.capture(tokens[:1], reads)
    with torch.no_grad():
        codes = coder.encode(torch.cat([found[name] for name in reads], dim=-1)[:, position])
    return {key: codes.context[key].reshape(-1)[:1] for key in ("mean", "std") if key in codes.context}
