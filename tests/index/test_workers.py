"""Several processes, several parts, a Ray cluster: whoever builds a shard and whoever dies, the bytes are the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from index.builds import Watched, asked, make_source, opens, small_cut, tree, watched
from unmix.core.errors import ConfigError, MachineError, NonFiniteError
from unmix.index.building import build
from unmix.index.shards import building_folder


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_cut(monkeypatch)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_do_not_change_a_byte(tmp_path: Path, reference: dict[str, bytes], workers: int) -> None:
    log = tmp_path / "log"
    build(tmp_path / "i", opens(log, pause=0.05), workers=workers)
    assert sorted(asked(log)) == [0, 4, 8, 12, 16, 20]  # each shard once
    assert tree(tmp_path / "i") == reference
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


def deadly(log: Path, lives: Path) -> Watched:
    """The first processes to build a shard kill themselves in the middle of it, one for each file in `lives`."""
    if os.getpid() != int((lives / "parent").read_text()):
        for life in sorted(lives.glob("life-*")):
            try:
                life.unlink()
            except FileNotFoundError:
                continue
            return watched(log, deadly=True)
    return watched(log)


def lives(folder: Path, n: int) -> Path:
    folder.mkdir()
    (folder / "parent").write_text(str(os.getpid()))
    for i in range(n):
        (folder / f"life-{i}").touch()
    return folder


def test_the_shards_of_dead_workers_are_built_by_others(tmp_path: Path, reference: dict[str, bytes]) -> None:
    log = tmp_path / "log"
    build(tmp_path / "i", partial(deadly, log, lives(tmp_path / "lives", 2)), workers=2)
    begun = asked(log)
    assert sorted(set(begun)) == [0, 4, 8, 12, 16, 20] and len(begun) == 8  # two shards were begun again
    assert tree(tmp_path / "i") == reference


def test_workers_that_always_die(tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmix.index.engines.processes.DEATHS", 1)
    log = tmp_path / "log"
    with pytest.raises(MachineError, match=r"worker processes died 4 times, the last one by signal 9; where memory is"):
        build(tmp_path / "i", partial(deadly, log, lives(tmp_path / "lives", 100)), workers=2)
    build(tmp_path / "i", make_source)
    assert tree(tmp_path / "i") == reference


def bad_codes(log: Path) -> Watched:
    source = watched(log)
    source.codes["a"].values[-1] = float("nan")
    return source


def test_the_error_of_a_worker_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"latent \d of 'a' at position 2\d\d: the value is nan") as caught:
        build(tmp_path / "i", partial(bad_codes, tmp_path / "log"), workers=2)
    assert "raised in a worker process" in "".join(caught.value.__notes__)
    with pytest.raises(RuntimeError, match="the model fell over"):
        build(tmp_path / "j", opens(tmp_path / "log", fail_at=14), workers=2)


def test_a_source_that_cannot_travel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be sent to worker processes .*: give a function of a module"):
        build(tmp_path / "i", lambda: make_source(1), workers=2)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {src!r}]
from pathlib import Path
import unmix.index.plan as plan
from index.builds import SHARD_TOKENS, LEAST_TOKENS, opens
from unmix.index.building import build
if __name__ == "__main__":
    plan.SHARD_TOKENS, plan.LEAST_TOKENS = SHARD_TOKENS, LEAST_TOKENS
    build(Path({folder!r}), opens(Path({log!r}), pause={pause}), workers={workers}, part={part})
"""


def start(
    tmp_path: Path, folder: str, pause: float, workers: int, part: tuple[int, int] | None = None
) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    script = tmp_path / f"{folder}-{part}.py"
    script.write_text(
        SCRIPT.format(
            tests=str(root / "tests"), src=str(root / "src"), folder=str(tmp_path / folder), log=str(tmp_path / "log"),
            pause=pause, workers=workers, part=part,
        )
    )  # fmt: skip
    return subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE)


def test_the_parent_of_workers_is_killed_and_takes_them_along(tmp_path: Path, reference: dict[str, bytes]) -> None:
    process = start(tmp_path, "i", 0.3, 2)
    end = time.monotonic() + 20
    while not (tmp_path / "log").is_file() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.4)
    process.kill()
    process.communicate()
    begun = asked(tmp_path / "log")
    assert 0 < len(begun) < 6 and not (tmp_path / "i").exists()
    time.sleep(0.5)
    assert asked(tmp_path / "log") == []  # nobody goes on unseen
    build(tmp_path / "i", make_source)
    assert tree(tmp_path / "i") == reference
    assert not building_folder(tmp_path / "i").exists()


def test_parts_at_the_same_time_in_one_folder(tmp_path: Path, reference: dict[str, bytes]) -> None:
    processes = [start(tmp_path, "i", 0.0, 1, (i, 3)) for i in range(3)]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    assert tree(tmp_path / "i") == reference
    assert not building_folder(tmp_path / "i").exists()


def test_ray_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError, match=r"needs the package 'ray': pip install 'unmix\[ray\]'"):
        build(tmp_path / "i", make_source, engine="ray", workers=2)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (extra `ray`)")
def test_two_ray_workers_one_of_which_is_killed(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root / "tests"), str(root / "src"), *sys.path]))
    import ray

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, _temp_dir=os.environ.get("RAY_TMPDIR"))
    try:
        log = tmp_path / "log"
        build(tmp_path / "i", partial(deadly, log, lives(tmp_path / "lives", 1)), workers=2, engine="ray")
        begun = asked(log)
        assert len(begun) == 7 and sorted(set(begun)) == [0, 4, 8, 12, 16, 20]  # one shard was begun twice
        assert tree(tmp_path / "i") == reference
        with pytest.raises(NonFiniteError, match=r"latent \d of 'a' at position 2\d\d: the value is nan"):
            build(tmp_path / "j", partial(bad_codes, log), workers=2, engine="ray")
    finally:
        ray.shutdown()
