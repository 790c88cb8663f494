"""The command line: one clear message, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmix.cli import COMMANDS, main

Run = Callable[..., tuple[int, str, str]]


def config(tmp_path: Path, **fields: Any) -> str:
    tree = {"model": {"name": str(tmp_path / "no-model")}, "coder": {"hook": "layers.1"}, **fields}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def test_help_lists_every_command_and_each_has_its_own(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in COMMANDS:
        assert f"\n  {name}" in out
        code, text, err = run(name, "--help")
        assert (code, err) == (0, "")
        assert text.startswith(f"usage: unmix {name}")


def test_version(run: Run) -> None:
    from unmix import __version__

    assert run("--version") == (0, f"unmix {__version__}\n", "")


def test_unknown_command(run: Run) -> None:
    code, out, err = run("evalaute")
    assert (code, out, err) == (2, "", "unmix: unknown command 'evalaute'. Did you mean 'evaluate'?\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coder.kk", "3"], "unknown field 'coder.kk'. Did you mean 'k'"),
        (["--coder.k", "0"], "coder.k: Input should be greater than 0 (found 0)"),
        (["--coder.n_latents", "64", "--coder.k", "100"], "k is 100, larger than n_latents = 64"),
        (["--data.tokens", "lots"], "data.tokens: "),
        (["--coder.k"], "--coder.k needs a value"),
        (["coder.k", "3"], "unexpected argument 'coder.k'"),
        (["--until", "trian"], "no stage 'trian'. Did you mean 'train'"),
        (["--redo", "everything"], "no stage 'everything'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    code, text, err = run("run", config(tmp_path), "--out", str(out), *arguments)
    assert (code, text) == (2, "")
    assert err.startswith("unmix: ")
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_unknown_model_is_one_message(run: Run, tmp_path: Path) -> None:
    code, _, err = run("run", config(tmp_path), "--out", str(tmp_path / "out"), "--quiet")
    assert code == 2
    assert "no-model" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "tokens").exists()


def test_full_disk(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run("run", config(tmp_path), "--out", str(tmp_path / "out"), "--quiet")
    assert code == 3
    assert err == f"unmix: cannot write {tmp_path / 'out' / 'run.yaml'}: the disk is full\n"
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_out_below_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    code, _, err = run("run", config(tmp_path), "--out", str(tmp_path / "file" / "out"), "--quiet")
    assert code == 3
    assert err == f"unmix: cannot write {tmp_path / 'file' / 'out'}: a part of the path is a file, not a folder\n"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from unmix.core.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["run", str(tmp_path / "nothing.yaml"), "--debug"])


def test_verify_names_the_broken_file(run: Run, tmp_path: Path) -> None:
    from unmix.coder import CoderConfig, SparseCoder
    from unmix.coder.config import TopK

    SparseCoder(CoderConfig(d_in=4, n_latents=8, activation=TopK(k=2))).save(tmp_path / "c")
    code, out, _ = run("verify", str(tmp_path))
    assert (code, out) == (0, f"whole   {tmp_path / 'c'}\n")
    weights = tmp_path / "c" / "coder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    code, out, err = run("verify", str(tmp_path))
    assert code == 4
    assert out == f"broken  {tmp_path / 'c'}\n"
    assert f"{weights}: found sha256" in err


def test_verify_of_nothing(run: Run, tmp_path: Path) -> None:
    code, _, err = run("verify", str(tmp_path))
    assert code == 2
    assert "no manifest.json there or below" in err


def test_inspect_and_convert(run: Run, tmp_path: Path) -> None:
    from unmix.coder import CoderConfig, SparseCoder
    from unmix.coder.config import TopK

    SparseCoder(CoderConfig(d_in=4, n_latents=8, activation=TopK(k=2))).save(tmp_path / "c")
    code, out, _ = run("inspect", str(tmp_path / "c"))
    assert code == 0
    assert "activation  topk k=2" in out
    code, out, _ = run("inspect", str(tmp_path / "c"), "--json")
    assert code == 0
    assert '"loadable": true' in out
    code, out, err = run("convert", str(tmp_path / "c"), str(tmp_path / "d"), "--format", "sae_lens")
    assert (code, err) == (0, "")
    assert (tmp_path / "d" / "cfg.json").is_file()
    code, _, err = run("convert", str(tmp_path / "c"), str(tmp_path / "e"), "--format", "sea_lens")
    assert code == 2
    assert "'sae_lens'" in err
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such run folder"),
        (["x", "--port", "http"], "--port: found 'http', allowed 0 to 65535"),
        (["x", "--prot", "1"], "unknown option --prot. Did you mean 'port'"),
    ],
)
def test_view_of_what_cannot_be_viewed(run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run("view", *arguments)
    assert code == 2
    assert message in err


def test_port_in_use_is_the_machines_fault(tmp_path: Path) -> None:
    from unmix.core.errors import MachineError
    from unmix.viewer.server import _listen

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MachineError, match="in use") as caught:
            _listen("127.0.0.1", taken.getsockname()[1])
    assert caught.value.exit_code == 3
