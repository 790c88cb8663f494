"""The four questions, and everything that must be refused."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from dataclasses import replace
from typing import Any

import anyio
import httpx
import pytest

pytest.importorskip("starlette", reason="the viewer's extra is not installed")

from unmix.core.errors import CorruptError, ModelError
from unmix.viewer.api import MAX_BODY, MAX_CHARACTERS, MAX_TOKENS, make_app
from unmix.viewer.shapes import PromptToken, ReportData
from viewer.makebelieve import HOSTILE, HOSTILE_LATENT, FakeReader, make_report_data

HOME = "http://127.0.0.1:8017"


@pytest.fixture(scope="module")
def data() -> ReportData:
    return make_report_data(40, 20, 20)


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def one() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:
            return await client.request(method, path, **options)

    return anyio.run(one)


def post(app: Any, text: Any, token: str | None = "secret", **options: Any) -> httpx.Response:
    headers = {} if token is None else {"x-unmix-token": token}
    if "content" not in options:
        options["json"] = {"text": text}
    return ask(app, "POST", "/api/prompt", headers=headers, **options)


def test_the_page_carries_its_token_and_no_data(data: ReportData) -> None:
    app = make_app(data)
    answer = ask(app, "GET", "/")
    assert answer.status_code == 200
    token = re.search(r'data-token="([^"]{20,})"', answer.text)
    assert token is not None
    assert post(app, "hello", token[1]).status_code == 404  # the token is right; there is no reader
    other = re.search(r'data-token="([^"]{20,})"', ask(make_app(data), "GET", "/").text)
    assert other is not None
    assert other[1] != token[1]


def test_every_answer_is_shut_in(data: ReportData) -> None:
    app = make_app(data)
    for path in ("/", "/unmix.js", "/unmix.css", "/api/run", "/api/nothing", "/api/latent/x"):
        headers = ask(app, "GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers


def test_files_have_their_types(data: ReportData) -> None:
    app = make_app(data)
    assert ask(app, "GET", "/unmix.js").headers["content-type"].startswith("text/javascript")
    assert ask(app, "GET", "/unmix.css").headers["content-type"].startswith("text/css")


def test_run_latents_and_a_latent(data: ReportData) -> None:
    app = make_app(data)
    run = ask(app, "GET", "/api/run").json()
    assert run["run"]["name"] == "demo"
    assert run["prompt"] is False
    assert len(run["first"]) == 12
    assert ask(app, "GET", "/api/latents").json()["ids"] == data.latents["ids"]
    page = ask(app, "GET", f"/api/latent/{HOSTILE_LATENT}")
    assert page.headers["content-type"] == "application/json"
    assert page.json()["top"][0]["tokens"] == list(HOSTILE)
    assert page.content.isascii()


@pytest.mark.parametrize("latent", ["40", "-1", "x", "1.5", "99999999999", "²", "１", "%00"])
def test_a_latent_that_is_none(data: ReportData, latent: str) -> None:
    answer = ask(make_app(data), "GET", f"/api/latent/{latent}")
    assert answer.status_code == 404
    assert re.fullmatch(r"no latent '.*': this coder has latents 0 to 39", answer.json()["error"])


def test_unknown_paths_and_methods_answer_in_json(data: ReportData) -> None:
    app = make_app(data)
    assert ask(app, "GET", "/etc/passwd").json() == {"error": "Not Found"}
    assert ask(app, "GET", "/api/prompt").status_code == 405
    assert ask(app, "GET", "/../../pyproject.toml").status_code == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8017"])
def test_another_name_for_this_machine_is_refused(data: ReportData, host: str) -> None:
    reader = FakeReader()
    app = make_app(data, reader, token="secret")
    for method, path in (("GET", "/"), ("GET", "/api/run"), ("POST", "/api/prompt")):
        answer = ask(app, method, path, headers={"host": host, "x-unmix-token": "secret"})
        assert answer.status_code == 400
        assert answer.json()["error"] == f"Host header {host!r} is not this server's; open it by its own address"
    assert reader.texts == []


def test_a_prompt_is_read(data: ReportData) -> None:
    reader = FakeReader(40)
    answer = post(make_app(data, reader, token="secret"), "one two\n three")
    assert answer.status_code == 200
    tokens = answer.json()["tokens"]
    assert [t["token"] for t in tokens] == ["one", " two", "\n", " three"]
    values = [value for _, value in tokens[1]["latents"]]
    assert values == sorted(values, reverse=True)
    assert reader.texts == ["one two\n three"]


@pytest.mark.parametrize("token", [None, "", "wrong", "secret2", "sécret"])
def test_a_post_without_the_token_is_refused(data: ReportData, token: str | None) -> None:
    reader = FakeReader()
    headers = {} if token is None else {"x-unmix-token": token.encode()}
    answer = ask(make_app(data, reader, token="secret"), "POST", "/api/prompt", headers=headers, json={"text": "a"})
    assert answer.status_code == 403
    assert answer.json() == {"error": "this page's token is missing or belongs to an earlier server; reload the page"}
    assert reader.texts == []


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b"not json", 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[" * 60_000, 400, "the body is not JSON"),
        (b"[]", 400, 'the body must be {"text": "..."}'),
        (b'{"text": 3}', 400, 'the body must be {"text": "..."}'),
        (b'{"text": " \\n"}', 400, "the text is empty"),
        (b'{"text": "\\ud800"}', 400, "the text holds half of a surrogate pair, which is no character"),
        (json.dumps({"text": "a" * (MAX_CHARACTERS + 1)}).encode(), 413, "the text has 4097 characters, allowed: 4096"),
        (b" " * (MAX_BODY + 1), 413, "the body is longer than 65536 bytes"),
    ],
    ids=["words", "bytes", "deep", "list", "number", "blank", "surrogate", "long", "huge"],
)
def test_bodies_that_are_refused(data: ReportData, body: bytes, status: int, error: str) -> None:
    reader = FakeReader()
    answer = post(make_app(data, reader, token="secret"), None, content=body)
    assert (answer.status_code, answer.json()) == (status, {"error": error})
    assert reader.texts == []


def test_the_longest_text_fits_whatever_it_is_made_of(data: ReportData) -> None:
    app = make_app(data, Reader([{"token": "a", "latents": []}]), token="secret")
    body = json.dumps({"text": "\U0001f642" * MAX_CHARACTERS}).encode()  # twelve bytes each
    assert post(app, None, content=body).status_code == 200


class Reader:
    """A reader that does what it is told."""

    def __init__(self, result: list[PromptToken] | Exception) -> None:
        self.result = result
        self.running, self.most = 0, 0

    def read(self, text: str) -> list[PromptToken]:
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.02)
        self.running -= 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_too_many_tokens_are_refused(data: ReportData) -> None:
    token: PromptToken = {"token": "a", "latents": []}
    answer = post(make_app(data, Reader([token] * (MAX_TOKENS + 1)), token="secret"), "a")
    assert (answer.status_code, answer.json()) == (413, {"error": "the text has 513 tokens, allowed: 512"})
    assert post(make_app(data, Reader([token] * MAX_TOKENS), token="secret"), "a").status_code == 200


def test_a_users_error_is_told_and_a_crash_is_logged(data: ReportData, caplog: pytest.LogCaptureFixture) -> None:
    answer = post(make_app(data, Reader(ModelError("the text is too long for this model")), token="secret"), "a")
    assert (answer.status_code, answer.json()) == (400, {"error": "the text is too long for this model"})
    with caplog.at_level(logging.ERROR, "unmix"):
        answer = post(make_app(data, Reader(RuntimeError("out of memory at 0xdead")), token="secret"), "a")
    assert (answer.status_code, answer.json()) == (500, {"error": "the server failed on this; its log says how"})
    assert "viewer: POST /api/prompt failed" in caplog.text
    assert "out of memory at 0xdead" in caplog.text


def test_a_broken_index_is_told(data: ReportData) -> None:
    def broken(latent: int):
        raise CorruptError("positions.bin: found 3 bytes, expected 8 bytes")

    answer = ask(make_app(replace(data, page=broken)), "GET", "/api/latent/3")
    assert (answer.status_code, answer.json()) == (500, {"error": "positions.bin: found 3 bytes, expected 8 bytes"})


def test_the_model_reads_one_prompt_at_a_time_while_pages_are_served(data: ReportData) -> None:
    reader = Reader([{"token": "a", "latents": [(1, 0.5)]}])
    threads: set[int] = set()

    def page(latent: int):
        threads.add(threading.get_ident())
        return data.page(latent)

    app = make_app(replace(data, page=page), reader, token="secret")
    answers: list[int] = []

    async def everything() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client, anyio.create_task_group() as group:

            async def one(i: int) -> None:
                if i % 2:
                    answer = await client.get("/api/latent/1")
                else:
                    answer = await client.post("/api/prompt", json={"text": "a"}, headers={"x-unmix-token": "secret"})
                answers.append(answer.status_code)

            for i in range(12):
                group.start_soon(one, i)

    anyio.run(everything)
    assert answers == [200] * 12
    assert reader.most == 1
    assert threading.get_ident() not in threads


def test_numbers_of_a_prompt_are_finite(data: ReportData) -> None:
    answer = post(make_app(data, Reader([{"token": "a", "latents": [(1, float("nan"))]}]), token="secret"), "a")
    assert answer.json() == {"tokens": [{"token": "a", "latents": [[1, None]]}]}
