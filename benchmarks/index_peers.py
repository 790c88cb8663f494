"""A latent index beside delphi's cache and loader, on the same codes.

    python -m benchmarks.index_peers --peer-python PEERS/delphi/bin/python
    python -m benchmarks.index_peers --peer-python … --tokens 128k --rounds 3

The other environment needs torch, eai-delphi and what it imports to cache and load (tests/index/fixtures/make_delphi.py
lists it). Every measurement is a process of its own, so that its peak memory is its own; builders take turns.

Building starts from what each side is given by an encoder: dense latents a batch (delphi), sparse codes (unmix); making
those is not counted. Showing a latent is 90 windows by quantile and 50 without a firing, of 32 tokens: delphi's own
defaults (40 train, 50 test, 50 non-activating). delphi opens the split that holds the latent each time it is asked for
one; "in bulk" is its loop over all latents, divided by their number.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.caches.common import BATCH, CONTEXT, HOOK, VOCAB, each, load

ROOT = Path(__file__).resolve().parent.parent


def make_codes(folder: Path, tokens: int, latents: int, k: int) -> None:
    """k different latents a token with Zipfian frequencies, log-normal values, and the tokens."""
    rng = np.random.default_rng(0)
    rows = tokens // CONTEXT
    weights = 1 / (np.arange(latents) + 20.0)
    edges = np.cumsum(weights / weights.sum())
    # Draws with repetition, thinned to k different ones: of 2 k + 16, the first k that are new.
    drawn = np.searchsorted(edges, rng.random((rows * CONTEXT, 2 * k + 16))).clip(max=latents - 1)
    order = np.argsort(drawn, axis=1, kind="stable")
    ranked = np.take_along_axis(drawn, order, axis=1)
    twice = np.zeros_like(ranked, bool)
    twice[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    again = np.zeros_like(twice)
    np.put_along_axis(again, order, twice, axis=1)
    first = np.argsort(again, axis=1, kind="stable")[:, :k]
    assert not np.take_along_axis(again, first, axis=1).any(), "a token drew too few different latents"
    ids = np.sort(np.take_along_axis(drawn, first, axis=1), axis=1).astype(np.int32)
    values = rng.lognormal(0, 1, ids.shape).astype(np.float32) + np.float32(0.01)
    np.save(folder / "ids.npy", rng.permutation(latents).astype(np.int32)[ids])
    np.save(folder / "values.npy", values)
    np.save(folder / "tokens.npy", rng.integers(1, VOCAB, (rows, CONTEXT)))


def build_ours(folder: Path, out: Path, latents: int) -> dict[str, Any]:
    """Seconds that `IndexWriter` takes for the codes."""
    from unmix.index.sources.arrays import ArrayCodes
    from unmix.index.writer import IndexWriter

    ids, values, tokens, _ = load(folder, latents)
    spent = 0.0
    writer = IndexWriter(out, {HOOK: latents}, CONTEXT, vocab_size=VOCAB, budget_bytes=2**28)
    for start in range(0, len(tokens), BATCH):
        rows = np.asarray(tokens[start : start + BATCH])
        cut = slice(start * CONTEXT, (start + len(rows)) * CONTEXT)
        some, those = np.array(ids[cut]), np.array(values[cut])
        order = np.argsort(some, axis=1)
        some, those = np.take_along_axis(some, order, 1), np.take_along_axis(those, order, 1)
        offsets = np.arange(len(some) + 1) * some.shape[1]
        codes = ArrayCodes(some.reshape(-1), those.reshape(-1), offsets, latents)
        documents = np.broadcast_to(np.arange(start, start + len(rows))[:, None], rows.shape)
        begun = time.perf_counter()
        writer.add(rows, np.zeros(len(rows), np.uint8), documents, np.ones(rows.shape, bool), {HOOK: codes})
        spent += time.perf_counter() - begun
    begun = time.perf_counter()
    writer.close()
    return {"seconds": spent + time.perf_counter() - begun}


def show_ours(out: Path, chosen: list[int]) -> dict[str, Any]:
    """Milliseconds for each latent."""
    from unmix.index.reader import open_index

    coder = open_index(out)[HOOK]

    def show(latent: int) -> int:
        return len(coder[latent].windows("quantiles", 90)) + len(coder[latent].negatives("random", 50))

    return {"ms": each(show, chosen)}


# both -----------------------------------------------------------------------------------------------------------


def worker(arguments: argparse.Namespace) -> None:
    """One measurement in this process, as JSON on the last line."""
    folder, out = Path(arguments.folder), Path(arguments.out)
    chosen = [int(word) for word in arguments.chosen.split(",")] if arguments.chosen else []
    if arguments.worker.endswith("delphi"):
        from benchmarks.caches.delphi import build_delphi, show_delphi
    if arguments.worker.startswith("build"):
        build = build_ours if arguments.worker == "build-ours" else build_delphi
        found = build(folder, out, arguments.latents)
    else:
        found = (show_ours if arguments.worker == "show-ours" else show_delphi)(out, chosen)
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def sizes(place: Path, postings: int) -> dict[str, tuple[float, float]]:
    """Bytes a posting of each: of postings alone, and of everything on disk (tokens, statistics, manifests)."""
    stored = sum(size(path) for path in (place / "ours" / HOOK).glob("segment-*"))
    splits = list((place / "delphi" / HOOK).glob("*.safetensors"))
    tokens = np.load(place / "tokens.npy", mmap_mode="r").nbytes
    alone = sum(path.stat().st_size - tokens for path in splits)
    return {
        "ours": (stored / postings, size(place / "ours") / postings),
        "delphi": (alone / postings, size(place / "delphi") / postings),
    }


def compare(arguments: argparse.Namespace) -> None:
    """Build by turns, then show, and print a table."""
    from benchmarks._timing import Spread, machine, table
    from unmix.core.config import parse_count
    from unmix.index.reader import open_index

    tokens = int(parse_count(arguments.tokens))
    python = {"ours": sys.executable, "delphi": arguments.peer_python}

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_codes(place, tokens, arguments.latents, arguments.k)

        def measure(task: str, name: str, chosen: str = "") -> dict[str, Any]:
            words = [python[name], "-m", "benchmarks.index_peers", "--worker", f"{task}-{name}"]
            words += ["--folder", scratch, "--out", str(place / name), "--latents", str(arguments.latents)]
            done = subprocess.run([*words, "--chosen", chosen], cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            return json.loads(done.stdout.splitlines()[-1])

        rounds = [{name: measure("build", name) for name in python} for _ in range(arguments.rounds)]
        index = open_index(place / "ours")
        order = index[HOOK].ranking("firings")
        order = order[index[HOOK].figures.firings[order] >= 200]
        chosen = ",".join(str(i) for i in order[:: max(len(order) // arguments.shown, 1)][: arguments.shown])
        shown = {name: measure("show", name, chosen) for name in python}
        postings = int(index[HOOK].figures.firings.sum())
        stored = sizes(place, postings)
    print(f"{machine()}\n{postings:,} postings: {tokens:,} tokens, k {arguments.k}, {arguments.latents:,} latents\n")
    ratio = Spread.of([one["delphi"]["seconds"] / one["ours"]["seconds"] for one in rounds])
    seconds = (Spread.of([one[name]["seconds"] for one in rounds]).show() for name in python)
    rows = [["building, s", *seconds, ratio.show()]]
    peaks = {name: max(one[name]["peak_mib"] for one in rounds) for name in python}
    rows.append(_row("peak memory of it, MiB", peaks, 0))
    one_by_one = {name: float(np.median(shown[name]["ms"])) for name in python}
    rows.append(_row("one latent's windows, ms", one_by_one, 2))
    rows.append(_row("the same in bulk, ms a latent", {**one_by_one, "delphi": shown["delphi"]["bulk_ms"]}, 2))
    rows.append(_row("peak memory of it, MiB", {name: shown[name]["peak_mib"] for name in python}, 0))
    for i, what in enumerate(("postings alone", "all files")):
        rows.append(_row(f"bytes a posting, {what}", {name: stored[name][i] for name in python}, 2))
    print(table(["", "unmix", "delphi", "ratio"], rows))


def _row(what: str, found: dict[str, float], digits: int) -> list[str]:
    ratio = found["delphi"] / found["ours"]
    return [what, f"{found['ours']:.{digits}f}", f"{found['delphi']:.{digits}f}", f"{ratio:.2f}"]


def main() -> None:
    """Compare, or be one of the workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="python of the environment with delphi")
    parser.add_argument("--tokens", default="32k")
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shown", type=int, default=15, help="latents shown")
    parser.add_argument(
        "--worker", choices=[f"{task}-{who}" for task in ("build", "show") for who in ("ours", "delphi")]
    )
    parser.add_argument("--folder", default="")
    parser.add_argument("--out", default="")
    parser.add_argument("--chosen", default="")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
    elif not arguments.peer_python:
        parser.error("--peer-python PATH: the python of an environment with delphi")
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
