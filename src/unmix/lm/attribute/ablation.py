"""What the model loses without one latent: its next-token distribution with and without, over many contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmix.core.errors import ConfigError
from unmix.lm.attribute.direct import check_latents
from unmix.lm.contexts import Contexts, as_contexts, read_batch
from unmix.lm.forward import attach_read, attach_write, run
from unmix.lm.sites import Pass
from unmix.lm.splice import Coder

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

_ROWS = 64
"""Positions whose logits are held at once, with and without the latent."""


@dataclass(frozen=True)
class ChangedToken:
    """A token whose log-probability moves with the latent."""

    token: int
    string: str
    difference: float
    """Mean over positions of log p with − log p without: positive where the latent raises it, in nats."""


@dataclass(frozen=True)
class AblationEffect:
    """One latent set to zero wherever it fires, all else as it was; figures over positions where it fires."""

    latent: int
    contexts: int
    """That were looked at."""
    firings: int
    """Positions where it fires."""
    kl: float
    """Mean KL(p with ‖ p without) at those positions, in nats."""
    kl_deviation: float
    """Standard deviation over those positions."""
    kl_after: float
    """Mean KL at positions after its first firing in the context where it does not fire itself."""
    loss_increase: float
    """Mean loss without − mean loss with, on the text's own next tokens at those positions, in nats."""
    raised: list[ChangedToken]
    """Tokens that the latent makes likelier, most first."""
    lowered: list[ChangedToken]


@torch.no_grad()
def ablation_effect(
    lm: LanguageModel, coder: Coder, latents: int | Sequence[int], data: Contexts | Tensor, *, n: int = 10,
    contexts: int | None = None, batch: int = 8,
) -> list[AblationEffect]:  # fmt: skip
    """The effect of ablating each latent on the next-token distribution, over contexts of `data`.

    The coder's error is kept: what is taken away is the latent's own part of the activation, at every position where
    it fires at once. Contexts where it is silent cost one pass that ends at the coder. `contexts`: how many to look at
    (default: all of role evaluate). Logits of 64 positions are held at a time.

    Raises `ModelError` for latents out of range and a coder that does not fit, `DataError` for tokens that are no
    contexts.
    """
    ids = check_latents(coder, latents)
    with lm.bind({"coder": coder}) as bound:  # refuses, before any pass, what one pass cannot splice
        (binding,) = bound.bindings
    source = as_contexts(data, coder.config.input_policy)
    chosen = source.contexts_of("evaluate")[:contexts]
    if not len(chosen) or batch < 1 or n < 1:
        raise ConfigError(f"{len(chosen)} contexts, batch {batch}, n {n}: each must be at least 1")
    sums = {latent: _Sums(lm.vocab_size) for latent in ids}
    for start in range(0, len(chosen), batch):
        part = read_batch(source, chosen[start : start + batch])
        fired = _codes(lm, binding, part)
        for latent in ids:
            where = _firing(fired, latent, part.mask)
            rows = where.any(-1)
            if bool(rows.any()):
                _compare(lm, binding, latent, part, where, rows, sums[latent])
    return [_finish(lm, latent, sums[latent], len(chosen), n) for latent in ids]


class _Sums:
    """Running sums of one latent."""

    def __init__(self, vocabulary: int) -> None:
        self.kls: list[Tensor] = []
        self.after: list[Tensor] = []
        self.losses = 0.0
        self.predicted = 0
        self.difference = torch.zeros(vocabulary, dtype=torch.float64)


def _codes(lm: LanguageModel, binding: Any, part: Any) -> Any:
    reads = [hook.name for hook in binding.reads]
    found = lm.capture(part.tokens, reads, documents=part.documents, policy=None)
    return binding.coder.encode(torch.cat([found[name] for name in reads], dim=-1))


def _firing(codes: Any, latent: int, mask: Tensor) -> Tensor:
    hits = (codes.indices == latent) & (codes.values != 0)
    where = torch.zeros(codes.rows, dtype=torch.bool, device=hits.device)
    where[codes.token_rows()[hits]] = True
    return where.view(mask.shape).cpu() & mask


def _compare(lm: LanguageModel, binding: Any, latent: int, part: Any, where: Tensor, rows: Tensor, sums: _Sums) -> None:
    """Adds the figures of the contexts `rows`, with and without the latent."""
    tokens = part.tokens[rows].to(lm.device)
    documents = None if part.documents is None else part.documents[rows]
    fires = where[rows]
    streams = [_ends(lm, binding, latent, tokens, documents, hit) for hit in (None, fires.to(lm.device))]
    later = (fires.long().cumsum(-1) > 0) & ~fires & part.mask[rows]
    for places, firing in ((fires.nonzero(), True), (later.nonzero(), False)):
        for some in places.split(_ROWS):
            b, t = (some[:, i].to(lm.device) for i in (0, 1))
            with_it, without = (lm.unembed(s[b, t]).float().log_softmax(-1) for s in streams)
            kl = (with_it.exp() * (with_it - without)).sum(-1).cpu()
            if not firing:
                sums.after.append(kl)
                continue
            sums.kls.append(kl)
            sums.difference += (with_it - without).double().sum(0).cpu()
            known = t + 1 < tokens.shape[1]
            following = tokens[b[known], t[known] + 1]
            gap = (with_it - without)[known].gather(-1, following[:, None])
            sums.losses += float(gap.double().sum())
            sums.predicted += int(known.sum())


def _ends(lm: LanguageModel, binding: Any, latent: int, tokens: Tensor, documents: Any, hit: Tensor | None) -> Tensor:
    """The stream after the last block; without the latent where `hit`."""
    ends: list[Tensor] = []
    received: dict[str, Tensor] = {}
    parts: list[list[Tensor]] = []

    def edit(x: Tensor, index: int) -> Tensor:
        name = binding.writes[index].name
        if any(hook.name == name for hook in binding.reads):
            received[name] = x
        if not parts:
            parts.append(_contribution(binding, latent, received))
        assert hit is not None
        return torch.where(hit[..., None], (x.to(parts[0][index].dtype) - parts[0][index]).to(x.dtype), x)

    def prepare(current: Pass) -> None:
        if hit is not None:
            written = {hook.name for hook in binding.writes}
            for hook in binding.reads:
                if hook.name not in written:
                    attach_read(current, hook, lambda x, name=hook.name: received.__setitem__(name, x))
            for index, hook in enumerate(binding.writes):
                attach_write(current, hook, lambda x, index=index: edit(x, index))
        attach_read(current, lm.hook(lm.last_hook), ends.append)

    run(lm, tokens, prepare, documents=documents, logits=False)
    return ends[0]


def _contribution(binding: Any, latent: int, received: dict[str, Tensor]) -> list[Tensor]:
    """What the latent adds at each write hook [batch, pos, d]."""
    coder = binding.coder
    codes = coder.encode(torch.cat([received[hook.name] for hook in binding.reads], dim=-1))
    without = replace(codes, values=torch.where(codes.indices == latent, 0.0, codes.values))
    return list((coder.decode(codes) - coder.decode(without)).split(binding.widths, dim=-1))


def _finish(lm: LanguageModel, latent: int, sums: _Sums, contexts: int, n: int) -> AblationEffect:
    kls = torch.cat([torch.zeros(0), *sums.kls]).double()
    after = torch.cat([torch.zeros(0), *sums.after]).double()
    count = len(kls)
    mean = sums.difference / max(count, 1)
    listed: list[list[ChangedToken]] = []
    for largest in (True, False):
        values, ids = mean.topk(min(n, len(mean)), largest=largest)
        kept = [(int(i), float(v)) for i, v in zip(ids, values) if (v > 0) == largest and v != 0]
        names = lm.token_strings([i for i, _ in kept]) if lm.has_tokenizer else [f"[{i}]" for i, _ in kept]
        listed.append([ChangedToken(i, name, value) for (i, value), name in zip(kept, names)])
    return AblationEffect(
        latent, contexts, count, float(kls.mean()) if count else 0.0, float(kls.std()) if count > 1 else 0.0,
        float(after.mean()) if len(after) else 0.0, sums.losses / max(sums.predicted, 1), *listed,
    )  # fmt: skip
