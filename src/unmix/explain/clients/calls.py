"""What is asked of a language model, what it answers, and how a call fails. No client is imported here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from unmix.core.config import Config
from unmix.core.errors import ServiceError

K = TypeVar("K")


class Sampling(Config):
    """Sampling parameters of one request; None leaves the server's own."""

    temperature: float | None = 0.0
    top_p: float | None = None
    max_tokens: int | None = 400
    seed: int | None = 0
    extra: dict[str, Any] = {}
    """Further fields of the request body, as the server names them."""


@dataclass(frozen=True)
class Request:
    """One chat completion."""

    system: str
    user: str
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Reply:
    """The text that came back and what it cost."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    """As the server says it, in its own currency; None where it says nothing."""


class CallError(ServiceError):
    """A request that failed for good: after its retries, or at once where retrying cannot help."""

    def __init__(
        self, kind: str, message: str, status: int | None = None, fatal: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status
        """`kind`: Unreachable, Timeout, RateLimited, ServerError, Unauthorised, NotFound, Rejected or BadBody."""
        self.fatal = fatal
        """No other request can succeed either."""
        self.wait = wait
        """Seconds that the server asks to wait before the next attempt."""


class Client(Protocol):
    """A language model somewhere."""

    def describe(self) -> dict[str, Any]:
        """What changes its answers (model name); enters the hash of a config. No address, no key."""
        ...

    def probe(self) -> None:
        """One cheap request; `CallError` where the service cannot be used."""
        ...

    def answers(self, jobs: Iterable[tuple[K, Sequence[Request]]]) -> Iterator[tuple[K, list[Reply] | CallError]]:
        """Run jobs concurrently and yield each as it is done; a job fails whole where one of its requests does.

        `jobs` is read in the caller's thread, a few ahead of what is running.
        """
        ...
