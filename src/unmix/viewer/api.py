"""The viewer's Starlette app: the page, its two files, four questions. Every answer but the files is JSON."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from unmix.core.errors import UnmixError
from unmix.viewer.page import SCRIPT, STYLE, asset, index_html
from unmix.viewer.report import overview
from unmix.viewer.security import App, Guard
from unmix.viewer.shapes import PromptReader, PromptToken, ReportData
from unmix.viewer.wire import number, to_json

log = logging.getLogger("unmix")

MAX_CHARACTERS = 4096
MAX_TOKENS = 512
MAX_BODY = 64 * 1024
"""Bytes of a POST: 4096 characters, each written as the longest JSON escape, and some."""
TOKEN_HEADER = "x-unmix-token"


def make_app(
    data: ReportData, reader: PromptReader | None = None, *, host: str = "127.0.0.1", token: str | None = None
) -> App:
    """The ASGI app. POSTs need `token` (by default a random one, written into the page that is served)."""
    token = token or secrets.token_urlsafe(24)
    state = _State(data, reader, token)
    page = index_html(data.run["name"], "served", token)
    routes = [
        Route("/", lambda _: HTMLResponse(page)),
        Route(f"/{SCRIPT}", _file(SCRIPT, "text/javascript")),
        Route(f"/{STYLE}", _file(STYLE, "text/css")),
        Route("/api/run", state.run),
        Route("/api/latents", state.latents),
        Route("/api/latent/{latent}", state.latent),
        Route("/api/prompt", state.prompt, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _crash})
    return Guard(app, host)


class _State:
    """What the routes share. The model reads one prompt at a time; index reads may overlap a little."""

    def __init__(self, data: ReportData, reader: PromptReader | None, token: str) -> None:
        self._data, self._reader, self._token = data, reader, token
        self._run = to_json({**overview(data), "prompt": reader is not None})
        self._table = to_json(data.latents)
        self._model_turn = anyio.Semaphore(1)
        self._index_turn = anyio.Semaphore(4)

    async def run(self, request: Request) -> Response:
        return _json_text(self._run)

    async def latents(self, request: Request) -> Response:
        return _json_text(self._table)

    async def latent(self, request: Request) -> Response:
        n = self._data.run["n_latents"]
        text = request.path_params["latent"]
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < n):
            raise HTTPException(404, f"no latent {text[:40]!r}: this coder has latents 0 to {n - 1}")
        async with self._index_turn:
            try:
                page = await anyio.to_thread.run_sync(self._data.page, int(text))
            except UnmixError as error:
                raise HTTPException(500, str(error)) from error
        return _json(page)

    async def prompt(self, request: Request) -> Response:
        given = request.headers.get(TOKEN_HEADER, "")
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            raise HTTPException(403, "this page's token is missing or belongs to an earlier server; reload the page")
        if self._reader is None:
            raise HTTPException(404, "no language model is loaded, so prompts cannot be read")
        text = prompt_text(await _body(request))
        async with self._model_turn:
            try:
                tokens = await anyio.to_thread.run_sync(self._reader.read, text)
            except UnmixError as error:
                raise HTTPException(400, str(error)) from error
        if len(tokens) > MAX_TOKENS:
            raise HTTPException(413, f"the text has {len(tokens)} tokens, allowed: {MAX_TOKENS}")
        return _json({"tokens": shown_tokens(tokens)})


def prompt_text(body: bytes) -> str:
    """The text of a POST `{"text": "..."}`; 400 or 413 as `HTTPException` otherwise."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON") from error
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise HTTPException(400, 'the body must be {"text": "..."}')
    if not text.strip():
        raise HTTPException(400, "the text is empty")
    if len(text) > MAX_CHARACTERS:
        raise HTTPException(413, f"the text has {len(text)} characters, allowed: {MAX_CHARACTERS}")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise HTTPException(400, "the text holds half of a surrogate pair, which is no character")
    return text


def shown_tokens(tokens: Sequence[PromptToken]) -> list[dict[str, Any]]:
    """Tokens with their latents, numbers as they are shown."""
    return [
        {"token": found["token"], "latents": [[int(i), number(value)] for i, value in found["latents"]]}
        for found in tokens
    ]


async def _body(request: Request) -> bytes:
    """The body, never held beyond its limit."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise HTTPException(413, f"the body is longer than {MAX_BODY} bytes")
        parts.append(part)
    return b"".join(parts)


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    content = asset(name)
    return lambda _: Response(content, media_type=kind)


def _json(value: Any) -> Response:
    return _json_text(to_json(value))


def _json_text(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json_text(to_json({"error": error.detail}), error.status_code)


async def _crash(request: Request, error: Exception) -> Response:
    log.error("viewer: %s %s failed", request.method, request.url.path, exc_info=error)
    return _json_text(to_json({"error": "the server failed on this; its log says how"}), 500)
