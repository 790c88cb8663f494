"""Registries: built-in parts and plugins through one door, nothing imported before it is asked for."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from unmix.core import plugins
from unmix.core.errors import ConfigError
from unmix.core.lazy import lazy_exports
from unmix.core.plugins import Registry
from unmix.core.seeds import derive, slug

REGISTRY = Registry("unmix.tests", "scorer", {"slug": "unmix.core.seeds:slug", "heavy": "no_such_package:thing"})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that adds `derive`, and tries to put itself in the place of `slug`."""
    entries = EntryPoints(
        [
            EntryPoint("derive", "unmix.core.seeds:derive", "unmix.tests"),
            EntryPoint("slug", "unmix.core.seeds:derive", "unmix.tests"),
            EntryPoint("elsewhere", "unmix.core.seeds:derive", "unmix.other"),
        ]
    )
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries.select(group=group))


def test_builtin_parts_are_resolved_on_first_use() -> None:
    """Knowing a name imports nothing."""
    assert REGISTRY.get("slug") is slug
    assert REGISTRY.names() == ["slug", "heavy"]
    assert "no_such_package" not in sys.modules


@pytest.mark.usefixtures("plugin")
def test_plugins_come_after_the_builtin_ones() -> None:
    """A plugin adds names; it does not quietly replace one."""
    assert REGISTRY.names() == ["slug", "heavy", "derive"]
    assert REGISTRY.get("derive") is derive
    assert REGISTRY.get("slug") is slug


@pytest.mark.usefixtures("plugin")
def test_an_unknown_name_gets_the_nearest() -> None:
    """Plugins' names are offered too."""
    with pytest.raises(ConfigError, match=r"^unknown scorer 'derives'\. Did you mean 'derive'\?$"):
        REGISTRY.get("derives")
    with pytest.raises(ConfigError, match=r"^unknown scorer 'qq'\. Allowed: slug, heavy, derive\.$"):
        REGISTRY.get("qq")


def test_lazy_exports_name_their_package() -> None:
    """As a module's own error does."""
    resolve = lazy_exports({"slug": "unmix.core.seeds"})
    assert resolve("pkg", "slug") is slug
    with pytest.raises(AttributeError, match=r"^module 'pkg' has no attribute 'nothing'$"):
        resolve("pkg", "nothing")
