"""Builds that are really killed: forks a child that sends itself SIGKILL at the n-th thing it asks of the system.

Run as a script: `killing.py FOLDER HOW N [N …]`. HOW is `build` or `writer`. Each child runs the same command in
the same folder; the last one is let through. Prints JSON: how many events an undisturbed run has, and which died.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path

EVENTS = {
    "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "fcntl.flock", "os.truncate",
    "shutil.rmtree", "shutil.copyfile", "tempfile.mkdtemp", "tempfile.mkstemp", "os.utime", "os.symlink",
}  # fmt: skip


def go(folder: Path, how: str) -> None:
    import unmix.index.plan as plan_module
    from index.builds import LEAST_TOKENS, SHARD_TOKENS, make_source
    from unmix.index.building import build
    from unmix.index.writer import IndexWriter

    os.fsync = lambda fd: None  # pyright: ignore[reportAttributeAccessIssue]
    plan_module.SHARD_TOKENS, plan_module.LEAST_TOKENS = SHARD_TOKENS, LEAST_TOKENS
    if how == "build":
        build(folder, make_source)
        return
    source = make_source()
    with IndexWriter(folder, source.latents, source.context, slices=source.slices, budget_bytes=3000) as writer:
        for b in source.batches(0, source.n_contexts):
            writer.add(b.tokens, b.roles, b.documents, b.mask, b.codes, b.slices)


def child(folder: Path, how: str, last: int | None) -> int:
    """Run in a fork that dies at event number `last`; the events it saw, or −1 where it was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        seen = 0

        def hook(event: str, _: object) -> None:
            nonlocal seen
            if event in EVENTS:
                seen += 1
                if seen == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        go(folder, how)
        os.write(write, str(seen).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert os.WEXITSTATUS(status) == 0, text
    return int(text)


def main() -> None:
    folder, how, *points = sys.argv[1:]
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]
    for module in ("index.builds", "unmix.index.building", "unmix.index.derive"):
        importlib.import_module(module)  # here, once, and not in every child
    place = Path(folder)
    report = []
    for i, word in enumerate(points):
        seen = [child(place / str(i), how, int(n)) for n in word.split("+")] if word != "0" else []
        report.append({"killed": [n < 0 for n in seen], "events": child(place / str(i), how, None)})
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
