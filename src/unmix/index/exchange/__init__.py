"""Other people's files of latents: delphi's caches in and out, Parquet out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.index.exchange.delphi_reading import DelphiSource as DelphiSource
    from unmix.index.exchange.delphi_writing import write_delphi as write_delphi
    from unmix.index.exchange.importing import read_delphi as read_delphi
    from unmix.index.exchange.parquet import write_parquet as write_parquet

_EXPORTS = {
    "DelphiSource": "unmix.index.exchange.delphi_reading",
    "read_delphi": "unmix.index.exchange.importing",
    "write_delphi": "unmix.index.exchange.delphi_writing",
    "write_parquet": "unmix.index.exchange.parquet",
}
_resolve = lazy_exports(_EXPORTS)


def __getattr__(name: str) -> Any:
    return _resolve(__name__, name)
