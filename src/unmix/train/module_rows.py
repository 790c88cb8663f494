"""Any module's activations as rows: run up to the last hook, flattened, collected once into memory or a file a hook."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmix.core.errors import ConfigError, DataError, NonFiniteError
from unmix.lm.forward import attach_read
from unmix.lm.model import LanguageModel
from unmix.lm.points import Hook
from unmix.lm.sites import Pass

Rows = dict[str, Float[Tensor, "rows d"]]
"""Rows of one batch by hook, as the hook was written."""

_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


class RowReader:
    """Runs a module on one batch and gives the rows at some hooks; the pass ends at the last of them."""

    def __init__(
        self,
        lm: LanguageModel,
        hooks: tuple[str, ...],
        dim: int | Mapping[str, int] | None,
        inputs: Callable[[Any], Any] | None,
        mask: Callable[[Any], Tensor] | None,
    ) -> None:
        """See `train_on` for `dim`, `inputs` and `mask`. `ModelError` for an unknown hook, with the nearest names."""
        self.lm = lm
        self.hooks: dict[str, Hook] = {spec: lm.hook(spec) for spec in hooks}
        self._dims = {spec: dim.get(spec) if isinstance(dim, Mapping) else dim for spec in hooks}
        if isinstance(dim, Mapping) and (unknown := sorted(set(dim) - set(hooks))):
            raise ConfigError(f"dim names {unknown[0]!r}, which is not one of the hooks: {', '.join(hooks)}")
        self._inputs, self._mask = inputs, mask
        self._widths: dict[str, int] = {}
        self._batch = 0

    @torch.no_grad()
    def rows(self, batch: Any) -> Rows:
        """Rows of every hook, in the module's dtype (float64 becomes float32), on the CPU.

        Raises `ConfigError` (a batch that the module does not take, a feature dimension that must be named),
        `DataError` (another width than before, no floating-point tensor) and `NonFiniteError`.
        """
        self._batch += 1
        found: dict[str, Tensor] = {}
        current = Pass(self.lm.names.dispatcher)
        for spec, hook in self.hooks.items():
            attach_read(current, hook, lambda x, s=spec: _keep(found, s, x))
        current.stop = True
        arguments, keywords = self._call(batch)
        with current.running():
            self.lm.model(*arguments, **keywords)
        current.check_seen()
        kept = None if self._mask is None else self._mask(batch).reshape(-1).bool().cpu()
        return {spec: self._flatten(spec, found[spec], kept) for spec in self.hooks}

    def _call(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A tensor is the one argument, a tuple or list the positional ones, a dict the keywords."""
        given = _moved(batch if self._inputs is None else self._inputs(batch), self.lm.device)
        arguments: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
        if isinstance(given, Mapping):
            keywords = dict(cast("Mapping[str, Any]", given))
        elif isinstance(given, (tuple, list)):
            arguments = tuple(cast("list[Any]", given))
        else:
            arguments = (given,)
        if self._batch == 1:
            self._check_call(arguments, keywords)
        return arguments, keywords

    def _check_call(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        model = self.lm.model
        try:
            inspect.signature(model.forward).bind(*arguments, **keywords)
        except TypeError as error:
            shown = ", ".join([*map(_shape, arguments), *(f"{k}={_shape(v)}" for k, v in keywords.items())])
            raise ConfigError(
                f"{type(model).__name__}.forward does not take a batch of ({shown}): {error}; say which part is the "
                "input, e.g. inputs=lambda batch: batch[0]"
            ) from None

    def _flatten(self, spec: str, x: Tensor, kept: Tensor | None) -> Tensor:
        name = self.hooks[spec].name
        if not x.is_floating_point():
            raise DataError(f"{name}: holds {x.dtype}, and a coder needs floating-point activations")
        dim = self._feature_dim(spec, x)
        rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
        rows = rows.to(torch.float32 if rows.dtype == torch.float64 else rows.dtype).cpu()
        width = self._widths.setdefault(spec, rows.shape[1])
        if rows.shape[1] != width:
            raise DataError(
                f"{name}: {rows.shape[1]} wide in batch {self._batch}, {width} before (activation {list(x.shape)}, "
                f"features in dimension {dim}): a coder needs rows of one width"
            )
        if kept is not None:
            if kept.numel() != rows.shape[0]:
                raise DataError(
                    f"{name}: mask= gave {kept.numel()} values for {rows.shape[0]} rows (batch {self._batch})"
                )
            rows = rows[kept]
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError(f"{name}: NaN or infinity in batch {self._batch}; nothing was trained on it")
        return rows

    def _feature_dim(self, spec: str, x: Tensor) -> int:
        hook, dim = self.hooks[spec], self._dims[spec]
        if dim is None:
            module = self.lm.names.dispatcher.module(hook.read.path)
            if x.ndim > 3 or isinstance(module, _CHANNELS_FIRST):
                raise ConfigError(
                    f"{hook.name}: the activation is {list(x.shape)}; say which dimension holds the features: dim=1 "
                    "for channels first [batch, channels, height, width], dim=-1 for channels last"
                )
            dim = -1
        if not -x.ndim <= dim < x.ndim:
            raise ConfigError(f"{hook.name}: the activation is {list(x.shape)} and has no dimension {dim}")
        return dim


@contextmanager
def at_rest(module: nn.Module) -> Generator[None]:
    """The module in evaluation mode while inside: no dropout, no running statistics moved. Then as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _keep(found: dict[str, Tensor], spec: str, x: Tensor) -> None:
    """Of a module that runs twice in a pass, the first run counts, whatever ends the pass."""
    found.setdefault(spec, x.detach())


def _moved(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`, through tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (tuple, list)):
        return [_moved(item, device) for item in cast("list[Any]", value)]
    return value


def _shape(value: Any) -> str:
    return f"Tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
