"""Serving a run on this machine: one uvicorn in a thread of its own, so that it also works inside a notebook."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import webbrowser
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING

from unmix.core.errors import ConfigError, MachineError, missing_extra
from unmix.viewer.security import is_loopback
from unmix.viewer.shapes import PromptReader, ReportData

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("unmix")

HOST, PORT = "127.0.0.1", 8017


class Viewer:
    """A running viewer: `.url`, `.stop()`, `.wait()`; also a context manager that stops it."""

    def __init__(self, server: uvicorn.Server, listening: socket.socket, url: str) -> None:
        self._server, self.url = server, url
        # A daemon: a notebook's kernel that ends must not wait for a page that is still open.
        self._thread = threading.Thread(target=server.run, args=([listening],), name="unmix-viewer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Block until the server stops or Ctrl-C, which stops it."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.2)
        except KeyboardInterrupt:
            log.info("viewer: stopping")
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop serving: open requests get two seconds."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(data: ReportData, reader: PromptReader | None = None, *, host: str = HOST, port: int = PORT) -> Viewer:
    """Serve `data` in the background and return at once. `port=0` takes any free one.

    Args:
        reader: reads prompts; without one the prompt box says that there is no model.
        host: 127.0.0.1 keeps the viewer on this machine. Any other address shows the run to the network.

    Raises:
        MachineError: the extra is not installed, or host and port cannot be had.
        ConfigError: a port that is no port.
    """
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise missing_extra(package, "viewer", "the viewer")
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}, allowed: 0 (any free one) to 65535")
    if not is_loopback(host):
        log.warning("viewer: bound to %s, so others on the network can read this run and use its model", host)
    import uvicorn

    from unmix.viewer.api import make_app

    app = make_app(data, reader, host=host)
    listening = _listen(host, port)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none", server_header=False,
        log_config=None, timeout_graceful_shutdown=2,
    )  # fmt: skip
    address = f"[{host}]" if ":" in host else host
    return Viewer(uvicorn.Server(config), listening, f"http://{address}:{listening.getsockname()[1]}/")


def serve(
    data: ReportData,
    reader: PromptReader | None = None,
    *,
    host: str = HOST,
    port: int = PORT,
    open_browser: bool = True,
) -> None:
    """Serve `data` until Ctrl-C; arguments and errors as `start`. Opens the page in a browser unless told not to."""
    viewer = start(data, reader, host=host, port=port)
    log.info("viewer: %s (Ctrl-C stops it)", viewer.url)
    if open_browser:
        webbrowser.open(viewer.url)
    viewer.wait()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, or one `MachineError` that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise MachineError(
                f"port {port} on {host} is in use (another viewer?); choose another with --port, or --port 0 for any"
            ) from error
        raise MachineError(f"cannot serve on {host} port {port}: {error.strerror or error}") from error
    return listening
