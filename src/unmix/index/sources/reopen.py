"""What an index was built from, opened again to mend it."""

from __future__ import annotations

from unmix.index.sources.opening import reopen as reopen
