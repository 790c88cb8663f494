"""A real port: taken, free, given back."""

from __future__ import annotations

import importlib.util
import logging
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the viewer's extra is not installed")

from unmix.core.errors import ConfigError, MachineError
from unmix.viewer.server import start
from viewer.makebelieve import make_report_data


def test_it_serves_on_this_machine_only_and_stops() -> None:
    with start(make_report_data(12, 4, 4), port=0) as viewer:
        assert viewer.url.startswith("http://127.0.0.1:")
        assert httpx.get(viewer.url + "api/run").json()["run"]["name"] == "demo"
        assert "server" not in httpx.get(viewer.url).headers
    with pytest.raises(httpx.ConnectError):
        httpx.get(viewer.url)


def test_a_taken_port_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MachineError) as caught:
            start(make_report_data(12, 4, 4), port=port)
    assert str(caught.value) == (
        f"port {port} on 127.0.0.1 is in use (another viewer?); choose another with --port, or --port 0 for any"
    )


def test_what_cannot_be_bound_says_so() -> None:
    data = make_report_data(12, 4, 4)
    with pytest.raises(ConfigError, match=r"^port is 70000, allowed: 0 \(any free one\) to 65535$"):
        start(data, port=70000)
    with pytest.raises(MachineError, match=r"^cannot serve on 203\.0\.113\.7 port 0: "):
        start(data, host="203.0.113.7", port=0)


def test_leaving_this_machine_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "unmix"), start(make_report_data(12, 4, 4), host="0.0.0.0", port=0):
        pass
    assert "bound to 0.0.0.0, so others on the network can read this run" in caplog.text


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmix.viewer.server.find_spec", lambda name: None if name == "uvicorn" else importlib.util)
    with pytest.raises(MachineError, match=r"^the viewer needs the package 'uvicorn': pip install 'unmix\[viewer\]'$"):
        start(make_report_data(12, 4, 4), port=0)


def test_ctrl_c_ends_it_quietly(root: Path, tmp_path: Path) -> None:
    """The whole process: serve, interrupt, exit 0, nothing on stderr."""
    script = textwrap.dedent(
        """
        import logging, signal, sys
        # A suite that runs in the background has SIGINT ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from viewer.makebelieve import make_report_data
        from unmix.viewer import server
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
        server.serve(make_report_data(12, 4, 4), port=0, open_browser=False)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"PYTHONPATH": f"{root / 'src'}:{root / 'tests'}", "PATH": ""},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("viewer: http://127.0.0.1:"), line + process.communicate()[1]
    assert httpx.get(line.split()[1] + "api/latents").status_code == 200
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "viewer: stopping" in out
    assert time.monotonic() - began < 5
