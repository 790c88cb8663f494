"""Passes that start in the middle: blocks whose result is known already are left out.

An end-to-end step runs a model twice on one text, as it is and with coders in place. Below the first coder both passes
are the same, so the second takes the stream of the first and goes on from there. Some families hand more from block to
block than the stream (keys and values that later layers share), so a model is tried on a few tokens before it is
believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.core.errors import ModelError

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel
    from unmix.lm.points import Hook


@dataclass(frozen=True)
class Start:
    """Blocks that a pass may leave out."""

    hook: str
    """Where their result stands: the stream after the last of them."""
    paths: tuple[str, ...]

    def skip(self, stream: Float[Tensor, "batch pos d"]) -> dict[str, Tensor]:
        """The argument of `LanguageModel.run` that starts a pass from `stream`, taken at `hook` on the same tokens."""
        return dict.fromkeys(self.paths, stream)


def find_start(lm: LanguageModel, hooks: Sequence[str]) -> Start | None:
    """The last start that leaves out nothing at or after `hooks`; `None` where a pass must begin at the tokens.

    Costs two passes over eight tokens, to see that the model gives the same from there.
    """
    blocks = _blocks(lm)
    n = min((depth(blocks, lm.hook(name)) for name in hooks), default=0)
    if n == 0:
        return None
    start = Start(f"blocks.{n - 1}.resid_post", tuple(blocks[:n]))
    return start if _believed(lm, start) else None


def depth(blocks: Sequence[str], hook: Hook) -> int:
    """How many of `blocks` (paths, in order) are over before anything of `hook` is read or replaced."""
    if hook.name == "final_norm":
        return len(blocks)
    sites = [site for site in (hook.read, hook.write, hook.base) if site is not None]
    depths: list[int] = []
    for site in sites:
        inside = [i for i, path in enumerate(blocks) if site.path == path or site.path.startswith(f"{path}.")]
        ends = bool(inside) and site.path == blocks[inside[0]] and site.side == "out"
        depths.append(inside[0] + ends if inside else 0)
    return min(depths)


def _blocks(lm: LanguageModel) -> list[str]:
    """Paths of the blocks, where each is a module that takes the stream and gives it back; else nothing."""
    try:
        hooks = [lm.hook(f"blocks.{layer}.resid_post") for layer in range(lm.n_layers)]
    except ModelError:
        return []
    plain = all(hook.direct and hook.read.side == "out" for hook in hooks)
    return [hook.read.path for hook in hooks] if plain else []


@torch.no_grad()
def _believed(lm: LanguageModel, start: Start) -> bool:
    tokens = torch.arange(8, device=lm.device).unsqueeze(0) % lm.vocab_size
    whole = lm.run(tokens, capture=[start.hook, lm.last_hook], logits=False).activations
    try:
        skip = start.skip(whole[start.hook])
        part = lm.run(tokens, capture=[lm.last_hook], logits=False, skip=skip).activations[lm.last_hook]
    except Exception:
        # Whatever a family's own code makes of blocks that give nothing but the stream.
        return False
    wanted = whole[lm.last_hook].float()
    return bool((part.float() - wanted).norm() <= 1e-3 * wanted.norm())
