"""A running mean of the weights, which is what is kept in the end (Gao et al. 2024, arXiv 2406.04093 appendix A).

The exponential mean of OpenAI's trainer (sparse_autoencoder, `EmaModel`): it begins at zero and is divided by 1 − βⁿ,
so that first weights count no more than others. Where decoder rows are held at norm 1 the mean's are brought back to
it, since a mean of unit vectors is shorter. Theirs leaves the last step out; here every step counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unmix.coder.sparse_coder import SparseCoder
from unmix.train.learner import Learner, keep_thresholds, normalise_decoder


def averaged(coder: SparseCoder) -> dict[str, nn.Parameter]:
    """The parameters that learn; a threshold that is a running mean already is taken as it is."""
    return {name: p for name, p in coder.named_parameters() if p.requires_grad}


@torch.no_grad()
def update_average(learner: Learner) -> None:
    """Take the weights after a step into the mean; nothing where the config asks for none."""
    decay = learner.config.ema
    if decay is None:
        return
    average = learner.state.average
    for name, p in averaged(learner.coder).items():
        if name not in average:
            average[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        average[name] = average[name].to(p.device)
        average[name].lerp_(p, 1 - decay)


@torch.no_grad()
def use_average(learner: Learner) -> None:
    """Put the mean in place of the weights, after the last step; nothing where there is none."""
    decay, average = learner.config.ema, learner.state.average
    if decay is None or not average:
        return
    for name, p in averaged(learner.coder).items():
        p.copy_(average[name] / (1 - decay**learner.state.step))
    if learner.unit_norm:
        normalise_decoder(learner.coder)
    keep_thresholds(learner.coder)


@torch.no_grad()
def restart_rows(learner: Learner, name: str, rows: Tensor) -> None:
    """Let the mean of some rows go on from what the parameter holds there now."""
    decay, average = learner.config.ema, learner.state.average
    if decay is not None and name in average:
        p = dict(learner.coder.named_parameters())[name]
        average[name][rows] = p[rows] * (1 - decay**learner.state.step)
