"""What can be wrong with a run's input: one message, the right exit code, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from unmix.cli import main

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*flags: str) -> tuple[int, str]:
        code = main(["run", str(run_file), "--out", str(tmp_path / "out"), "--quiet", *flags])
        return code, capsys.readouterr().err

    return call


def made(tmp_path: Path) -> list[str]:
    """Files of the run, its own notes left out."""
    found = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    return sorted(path.name for path in found if path.name not in ("run.yaml", ".lock"))


def test_a_text_that_is_not_there(run: Run, tmp_path: Path) -> None:
    code, err = run("--data", str(tmp_path / "no.txt"))
    assert code == 2
    assert str(tmp_path / "no.txt") in err
    assert err.count("\n") == 1
    assert made(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "empty"), (b"\x00\x01\x02" * 500, "binary"), (b"too short", "context")]
)
def test_a_text_that_is_no_text(run: Run, tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    code, err = run("--data", str(path))
    assert code == 2
    assert str(path) in err
    assert word in err
    assert err.count("\n") == 1
    assert made(tmp_path) == []


def test_an_unknown_hook_lists_near_ones(run: Run, tmp_path: Path) -> None:
    code, err = run("--hook", "blocks.1.resid_pots")
    assert code == 2
    assert "blocks.1.resid_post" in err
    assert made(tmp_path) == []


def test_k_above_the_width_of_the_hook(run: Run, tmp_path: Path) -> None:
    code, err = run("--coder.n_latents", "null", "--coder.expansion", "1", "--coder.k", "33")
    assert (code, err) == (2, "unmix: coder at blocks.1.resid_post: k is 33, larger than n_latents = 32\n")
    assert made(tmp_path) == []


def test_a_broken_token_shard_is_named(run: Run, tmp_path: Path) -> None:
    assert run("--until", "tokens")[0] == 0
    shard = next(path for path in sorted((tmp_path / "out" / "tokens").iterdir()) if path.suffix != ".json")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    code, err = run()
    assert code == 4
    assert str(shard) in err
    assert "sha256" in err
    assert not (tmp_path / "out" / "coders").exists()


@pytest.mark.parametrize("harm", [lambda data: data[:-4], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_broken_activation_chunk_is_named(run: Run, tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    assert run("--until", "activations")[0] == 0
    chunk = next((tmp_path / "out" / "activations").rglob("*.bin"))
    chunk.write_bytes(harm(chunk.read_bytes()))
    code, err = run()
    assert code == 4
    assert str(chunk) in err


def test_text_with_too_few_tokens_for_a_batch(run: Run, tmp_path: Path) -> None:
    code, err = run("--data.tokens", "2000", "--train.batch", "100k")
    assert code == 2
    assert "fewer than one batch of 100000" in err
    assert not (tmp_path / "out" / "coders").exists()
