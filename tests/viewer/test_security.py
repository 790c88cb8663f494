"""Which Host headers are ours."""

from __future__ import annotations

import pytest

from unmix.viewer.security import host_allowed, is_loopback


@pytest.mark.parametrize(
    "header", ["127.0.0.1:8017", "localhost:8017", "LOCALHOST", "[::1]:8017", "[::1]", "127.0.0.1", "127.1.2.3:80"]
)
def test_loopback_names_are_ours(header: str) -> None:
    assert host_allowed(header, "127.0.0.1")


@pytest.mark.parametrize(
    "header",
    [
        "evil.example", "evil.example:8017", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.5:8017", "",
        "127.0.0.1:8017@evil.example", "[::1]evil", "localhost:evil", "[evil]:80", "0x7f000001", "2130706433", "[::1",
    ],
)  # fmt: skip
def test_names_that_others_control_are_not(header: str) -> None:
    assert not host_allowed(header, "127.0.0.1")


def test_a_server_opened_to_the_network_answers_to_addresses_and_its_own_name() -> None:
    assert host_allowed("192.168.1.5:8017", "0.0.0.0")
    assert host_allowed("lab-machine:8017", "lab-machine")
    assert not host_allowed("evil.example", "0.0.0.0")


def test_loopback() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "lab")] == [True] * 3 + [False] * 2
