"""The OpenAI-compatible client against a server that stands in for the service."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from unmix.core.errors import ConfigError
from unmix.explain.clients.calls import CallError, Reply, Request, Sampling
from unmix.explain.clients.openai import OpenAIClient

Answer = Callable[[dict[str, Any], dict[str, str]], tuple[int, str]]


@contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            status, text = answer(body, dict(self.headers))
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/v1", seen
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def chat(text: Any, **more: Any) -> str:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def ask(text: str = "hello", **sampling: Any) -> Request:
    return Request("", text, Sampling(**sampling))


def answers(client: OpenAIClient, *requests: Request) -> list[Reply | CallError]:
    found = dict(client.answers((i, [request]) for i, request in enumerate(requests)))
    return [one if isinstance(one := found[i], CallError) else one[0] for i in range(len(requests))]


def test_every_job_has_its_own_parameters() -> None:
    def answer(body: dict[str, Any], _: dict[str, str]) -> tuple[int, str]:
        time.sleep(0.05 if body["messages"][0]["content"] == "a" else 0)
        return 200, chat(f"{body['messages'][0]['content']} at {body['temperature']}")

    with server(answer) as (url, seen):
        client = OpenAIClient(url, "m", concurrency=2)
        found = answers(client, ask("a", temperature=0.0, seed=None), ask("b", temperature=0.7, seed=5))
    assert [reply.text for reply in found if isinstance(reply, Reply)] == ["a at 0.0", "b at 0.7"]
    assert {body.get("seed") for body in seen} == {None, 5}
    assert all(body["model"] == "m" for body in seen)
    assert isinstance(found[0], Reply)
    assert (found[0].prompt_tokens, found[0].completion_tokens) == (7, 3)


def test_a_system_message_comes_first_and_extra_fields_go_along() -> None:
    with server(lambda *_: (200, chat("x"))) as (url, seen):
        answers(OpenAIClient(url, "m"), Request("be brief", "hello", Sampling(extra={"min_p": 0.1})))
    assert [m["role"] for m in seen[0]["messages"]] == ["system", "user"]
    assert seen[0]["min_p"] == 0.1


def test_jobs_are_bounded_and_read_as_they_go() -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def answer(*_: object) -> tuple[int, str]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return 200, chat("x")

    read: list[int] = []

    def jobs() -> Iterator[tuple[int, list[Request]]]:
        for i in range(30):
            read.append(i)
            yield i, [ask()]

    with server(answer) as (url, _):
        stream = OpenAIClient(url, "m", concurrency=3).answers(jobs())
        next(stream)
        assert len(read) <= 8
        assert len(list(stream)) == 29
    assert most[0] <= 3


def test_a_busy_server_is_asked_again() -> None:
    tries = iter([(429, "slow down"), (503, ""), (200, chat("ok"))])
    with server(lambda *_: next(tries)) as (url, seen):
        (found,) = answers(OpenAIClient(url, "m", first_pause=0.01), ask())
    assert isinstance(found, Reply)
    assert found.text == "ok"
    assert len(seen) == 3


def test_a_broken_server_fails_one_job_and_no_other() -> None:
    def answer(body: dict[str, Any], _: dict[str, str]) -> tuple[int, str]:
        return (500, "boom") if body["messages"][0]["content"] == "bad" else (200, chat("fine"))

    with server(answer) as (url, seen):
        good, bad = answers(OpenAIClient(url, "m", retries=2, first_pause=0.01), ask("good"), ask("bad"))
    assert isinstance(good, Reply)
    assert isinstance(bad, CallError)
    assert (bad.kind, str(bad)) == ("ServerError", f"{url}/chat/completions: status 500: boom")
    assert len(seen) == 4


def test_what_cannot_succeed_is_not_tried_again() -> None:
    with server(lambda *_: (400, "context too long")) as (url, seen):
        (found,) = answers(OpenAIClient(url, "m", first_pause=0.01), ask())
    assert isinstance(found, CallError)
    assert (found.kind, found.fatal) == ("Rejected", False)
    assert len(seen) == 1


@pytest.mark.parametrize("text", ["not json", "{}", chat(None), '{"choices": []}'])
def test_an_answer_that_is_no_completion_is_a_failure_that_shows_it(text: str) -> None:
    with server(lambda *_: (200, text)) as (url, _):
        (found,) = answers(OpenAIClient(url, "m"), ask())
    assert isinstance(found, CallError)
    assert found.kind == "BadBody"
    assert "the answer is no chat completion" in str(found)
    assert text[:50] in str(found)


def test_timeout() -> None:
    def answer(*_: object) -> tuple[int, str]:
        time.sleep(0.5)
        return 200, chat("late")

    with server(answer) as (url, _):
        (found,) = answers(OpenAIClient(url, "m", timeout=0.05, retries=0), ask())
    assert isinstance(found, CallError)
    assert found.kind == "Timeout"
    assert "no answer in 0.05 s; raise client.timeout or lower client.concurrency" in str(found)


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
        return (200, chat("in")) if headers.get("Authorization") == "Bearer s3cret" else (401, "no")

    with server(answer) as (url, seen):
        client = OpenAIClient(url, "m", api_key_env="UNMIX_TEST_KEY")
        monkeypatch.delenv("UNMIX_TEST_KEY", raising=False)
        with pytest.raises(CallError, match=r"status 401: the key in \$UNMIX_TEST_KEY is not set"):
            client.probe()
        monkeypatch.setenv("UNMIX_TEST_KEY", "wrong-key")
        with pytest.raises(CallError, match=r"\$UNMIX_TEST_KEY is set but was refused") as caught:
            client.probe()
        assert caught.value.fatal
        assert "wrong-key" not in str(caught.value)
        monkeypatch.setenv("UNMIX_TEST_KEY", "s3cret")
        client.probe()
    assert seen[-1]["max_tokens"] == 1


def test_a_server_that_is_not_there_is_one_clear_error() -> None:
    with server(lambda *_: (200, chat("x"))) as (url, _):
        pass
    with pytest.raises(CallError, match=r"/v1/chat/completions: cannot be reached .*is the server running\?") as caught:
        OpenAIClient(url, "m").probe()
    assert (caught.value.exit_code, caught.value.kind) == (3, "Unreachable")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", ""])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match=r"client\.base_url: found"):
        OpenAIClient(url, "m")
