"""What stands before every request: the Host check against DNS rebinding, and headers that shut the page in."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from unmix.viewer.page import POLICY_SERVED
from unmix.viewer.wire import to_json

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "content-security-policy": f"{POLICY_SERVED}; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware. `host` is what the server is bound to."""

    def __init__(self, app: App, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", []) if pair[0].decode().lower() not in HEADERS]
                message["headers"] = kept + [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        hosts = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
        if len(hosts) == 1 and host_allowed(hosts[0], self.host):
            await self.app(scope, receive, guarded)
            return
        error = f"Host header {hosts[0] if hosts else '(none)'!r} is not this server's; open it by its own address"
        body = to_json({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await guarded({"type": "http.response.start", "status": 400, "headers": headers})
        await guarded({"type": "http.response.body", "body": body})


def host_allowed(header: str, bound: str) -> bool:
    """Whether a Host header can be ours.

    A rebinding attack needs a name that it controls. So: `localhost`, loopback addresses, and, where the user bound
    the server to something else, that name and plain addresses (which no DNS answer can stand behind).
    """
    name = _host_name(header)
    if name in ("localhost", bound.lower()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or not is_loopback(bound)


def is_loopback(host: str) -> bool:
    """Whether binding to `host` keeps the server on this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    """`[::1]:8017` → `::1`, `LOCALHOST:8017` → `localhost`; what has an odd form stays as it is and fits nothing."""
    text = header.strip().lower()
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        return name if bracket and (rest == "" or _is_port(rest)) else text
    name, colon, port = text.partition(":")
    return name if not colon or _is_port(":" + port) else text


def _is_port(text: str) -> bool:
    return text.startswith(":") and text[1:].isdecimal() and text.isascii()
