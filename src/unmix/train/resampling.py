"""Dead latents begun anew where the coder is worst (Bricken et al. 2023, appendix "Neuron resampling").

As there: rows are drawn with a chance proportional to the square of the coder's loss on them; a dead latent's decoder
row points along what the row asks for, its encoder row along what it reads, a fifth as long as living ones are; its
bias is 0 and its part of the optimiser's state is forgotten. dictionary_learning does the same with the error's norm as
the chance (and warms the learning rate up again, which is not done here). It was made for relu coders with a penalty:
in top-k coders so short a row is seldom among the k largest, and auxk does more.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.core.seeds import derive
from unmix.train.averaging import restart_rows
from unmix.train.config import OptimConfig
from unmix.train.learner import Learner
from unmix.train.objectives.decoding import without_codes
from unmix.train.source import ActivationSource

log = logging.getLogger("unmix")

SHORT = 0.2
"""Length of a new encoder row, of the mean length of the living ones."""
FORGETS = ("adam", "signum", "muon")
"""Optimisers whose state is momenta, so that a row of it can be forgotten."""
_ROWS = 2048
"""Rows coded at a time."""


def moments(config: OptimConfig, steps: int) -> tuple[int, ...]:
    """The steps after which dead latents are begun anew."""
    return tuple(sorted({max(1, round(share * steps)) for share in config.resample}))


def require_resampling(name: str, config: OptimConfig) -> None:
    """`ConfigError` for an optimiser whose state has no rows that could be forgotten."""
    if config.resample and config.optimiser not in FORGETS:
        raise ConfigError(
            f"{name}: train.resample forgets what the optimiser knows of a latent, and {config.optimiser} keeps more "
            f"than momenta; allowed: {', '.join(FORGETS)}"
        )


@torch.no_grad()
def resample(learner: Learner, source: ActivationSource) -> int:
    """Begin the dead latents of now anew, and return how many.

    A function of the learner's state and of the rows alone, so that a resumed training does the same.
    """
    config, state, coder = learner.config, learner.state, learner.coder
    dead = (state.tokens_since_fired >= config.dead_after).nonzero().squeeze(-1)
    if dead.numel() == 0:
        return 0
    reads, wants, chance = _rows(learner, source)
    possible = int((chance > 0).sum())
    dead = dead[: min(dead.numel(), possible)]
    if dead.numel() == 0:
        return 0
    generator = torch.Generator().manual_seed(derive(config.seed, "resample", coder.name, str(state.step)))
    chosen = torch.multinomial(chance.cpu(), dead.numel(), generator=generator).to(reads.device)
    _begin(learner, dead, reads[chosen], wants[chosen])
    state.tokens_since_fired[dead] = 0
    log.info("%s: %d dead latents begun anew after step %d", coder.name, dead.numel(), state.step)
    return dead.numel()


def _rows(learner: Learner, source: ActivationSource) -> tuple[Tensor, Tensor, Tensor]:
    """What rows near the training's place hold: `(read [n, d_in], wanted of the dictionary [n, d_out], chance [n])`."""
    size = min(learner.config.resample_rows, source.n_rows)
    x, target = source.batch(learner.state.step * learner.config.batch // size, size)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, wanted in zip(x.split(_ROWS), target.split(_ROWS), strict=True):
        step = learner.forward(part, wanted)
        bias = learner.coder.input_bias()
        loss = (step.target - step.reconstruction).double().square().sum(-1)
        found.append((step.x if bias is None else step.x - bias, step.target - without_codes(step), loss.square()))
    reads, wants, chance = (torch.cat(parts) for parts in zip(*found, strict=True))
    usable = (reads.norm(dim=-1) > 0) & (wants.norm(dim=-1) > 0)
    return reads, wants, chance * usable


def _begin(learner: Learner, dead: Tensor, reads: Tensor, wants: Tensor) -> None:
    coder = learner.coder
    alive = torch.ones(coder.n_latents, dtype=torch.bool, device=dead.device)
    alive[dead] = False
    some = bool(alive.any())
    encoder_norm = coder.W_enc[alive].norm(dim=-1).mean() if some else coder.W_enc.norm(dim=-1).mean()
    decoder_norm = coder.W_dec[alive].norm(dim=-1).mean() if some and not learner.unit_norm else 1.0
    coder.W_enc[dead] = torch.nn.functional.normalize(reads, dim=-1) * (SHORT * encoder_norm)
    coder.W_dec[dead] = torch.nn.functional.normalize(wants, dim=-1) * decoder_norm
    coder.b_enc[dead] = 0.0
    for name, first in coder.encoder.parameters(coder.n_latents).items():
        own = coder.extra()[name]
        if own.ndim > 0:
            own[dead] = first.to(own)[dead]
    for name, parameter in by_latent(coder).items():
        for part in learner.optimiser.state.get(parameter, {}).values():
            if isinstance(part, Tensor) and part.shape == parameter.shape:
                part[dead] = 0
        restart_rows(learner, name, dead)


def by_latent(coder: SparseCoder) -> dict[str, torch.nn.Parameter]:
    """The parameters that have one row a latent."""
    names = ("W_enc", "b_enc", "W_dec", *(name for name, own in coder.extra().items() if own.ndim > 0))
    return {name: parameter for name, parameter in coder.named_parameters() if name in names}
