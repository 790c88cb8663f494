"""Any OpenAI-compatible endpoint: vLLM, llama.cpp, OpenRouter, OpenAI and the like, over httpx.

Jobs run on a bounded pool of threads that share one connection pool; the caller stays synchronous and gets each job
as it is done. The key is read from an environment variable and never stored, logged or put into an error.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import httpx

from unmix.core.errors import ConfigError
from unmix.explain.clients.calls import CallError, Reply, Request, Sampling

K = TypeVar("K")

LONGEST_PAUSE = 60.0
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class OpenAIClient:
    """Chat completions of one model at one `base_url` (which ends in `/v1` for most servers)."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 4,
        first_pause: float = 1.0,
    ) -> None:
        """`timeout` and `first_pause` in seconds; `retries` follow the first try after pauses that double.

        `ConfigError` for a URL that is no http(s) URL, or settings out of range.
        """
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"client.base_url: found {base_url!r}, expected something like http://127.0.0.1:8000/v1")
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise ConfigError(
                "client: need concurrency >= 1, retries >= 0 and timeout > 0, "
                f"found {concurrency}, {retries} and {timeout}"
            )
        self.base_url, self.model = base_url.rstrip("/"), model
        self._key_name = api_key_env
        self._concurrency, self._timeout = concurrency, timeout
        self._retries, self._pause = retries, first_pause
        self._stopped = threading.Event()

    def describe(self) -> dict[str, Any]:
        """The model's name: what changes answers."""
        return {"client": "openai", "model": self.model}

    def probe(self) -> None:
        """Ask for one token, once. `CallError` names the URL, what it said, and what to do."""
        with self._http() as http:
            self._try(http, Request("", "Say yes.", Sampling(max_tokens=1)))

    def answers(self, jobs: Iterable[tuple[K, Sequence[Request]]]) -> Iterator[tuple[K, list[Reply] | CallError]]:
        """See `Client.answers`. At most `concurrency` jobs run and as many wait; stopping early cancels the rest."""
        self._stopped.clear()
        running: dict[Future[list[Reply] | CallError], K] = {}
        with self._http() as http, ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for key, requests in jobs:
                    running[pool.submit(self._job, http, tuple(requests))] = key
                    while len(running) >= 2 * self._concurrency:
                        yield from _finished(running)
                while running:
                    yield from _finished(running)
            finally:
                self._stopped.set()
                for future in running:
                    future.cancel()

    def _http(self) -> httpx.Client:
        key = os.environ.get(self._key_name)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self._concurrency)
        return httpx.Client(headers=headers, timeout=self._timeout, limits=limits)

    def _job(self, http: httpx.Client, requests: tuple[Request, ...]) -> list[Reply] | CallError:
        try:
            return [self._one(http, request) for request in requests]
        except CallError as error:
            return error

    def _one(self, http: httpx.Client, request: Request) -> Reply:
        attempt = 0
        while True:
            try:
                return self._try(http, request)
            except CallError as error:
                lasting = error.kind not in ("Unreachable", "Timeout", "RateLimited", "ServerError")
                if lasting or attempt >= self._retries:
                    raise
                pause = min(max(error.wait, self._pause * 2**attempt), LONGEST_PAUSE)
                if self._stopped.wait(pause * random.uniform(1, 1.1)):
                    raise
                attempt += 1

    def _try(self, http: httpx.Client, request: Request) -> Reply:
        url = f"{self.base_url}/chat/completions"
        try:
            response = http.post(url, json=self._body(request))
        except httpx.TimeoutException:
            message = f"{url}: no answer in {self._timeout:g} s; raise client.timeout or lower client.concurrency"
            raise CallError("Timeout", message) from None
        except httpx.HTTPError as error:
            message = f"{url}: cannot be reached ({error or type(error).__name__}); is the server running?"
            raise CallError("Unreachable", message) from error
        if response.status_code != 200:
            raise self._refusal(url, response)
        return _reply(url, response)

    def _body(self, request: Request) -> dict[str, Any]:
        messages = [{"role": "user", "content": request.user}]
        if request.system:
            messages.insert(0, {"role": "system", "content": request.system})
        settings = request.sampling.model_dump(exclude={"extra"}, exclude_none=True)
        return {"model": self.model, "messages": messages, **settings, **request.sampling.extra}

    def _refusal(self, url: str, response: httpx.Response) -> CallError:
        status = response.status_code
        where = f"{url}: status {status}"
        if status in (401, 403):
            state = "is set but was refused" if os.environ.get(self._key_name) else "is not set"
            return CallError("Unauthorised", f"{where}: the key in ${self._key_name} {state}", status, fatal=True)
        if status == 404:
            hint = f"no such path or model {self.model!r}; most servers want a base_url that ends in /v1"
            return CallError("NotFound", f"{where}: {hint}", status, fatal=True)
        if status == 429:
            hint = "too many requests; lower client.concurrency"
            return CallError("RateLimited", f"{where}: {hint}", status, wait=_retry_after(response))
        said = response.text[:200].strip() or "no message"
        kind = "ServerError" if status in _AGAIN else "Rejected"
        return CallError(kind, f"{where}: {said}", status, wait=_retry_after(response))


def _finished(running: dict[Future[list[Reply] | CallError], K]) -> Iterator[tuple[K, list[Reply] | CallError]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in [future for future in running if future in done]:
        yield running.pop(future), future.result()


def _reply(url: str, response: httpx.Response) -> Reply:
    try:
        tree = response.json()
        text = tree["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        usage = tree.get("usage") or {}
        cost = usage.get("cost")
        return Reply(
            text,
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            None if cost is None else float(cost),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        said = response.text[:200]
        message = f"{url}: the answer is no chat completion ({type(error).__name__}: {error}): {said}"
        raise CallError("BadBody", message, response.status_code) from error


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the service asks to wait."""
    try:
        return max(float(response.headers.get("retry-after", 0)), 0.0)
    except ValueError:
        return 0.0
