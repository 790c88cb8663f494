"""From nothing to the first codes of a large coder on disk, and from one layout to another: time and memory.

    python -m benchmarks.loading                       # jumprelu, 131,072 latents of 2,304 dimensions, SAELens' layout
    python -m benchmarks.loading --latents 16384       # smaller
    python -m benchmarks.loading --convert native      # and conversion to the native layout

Each reading is a process of its own: it imports, loads, and encodes 64 tokens. Peers run in `.cache/peers`
(`make peers`); without it they are left out. `read` reads the file's bytes once, as the least that anybody can do.
Memory is anonymous memory at its peak, less what the imports left (what the work itself holds), and the resident peak
of the whole process, mapped files included.
The pages of the file are in the cache for all alike (one untimed read comes first); runs alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PEER = Path(".cache/peers/bin/python")

PRELUDE = """
import json, os, resource, sys, threading, time
began = time.perf_counter()
peak = 0
done = threading.Event()
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())
threading.Thread(target=watch, daemon=True).start()
place, d, rows = sys.argv[1], int(sys.argv[2]), 64
def mark(): return time.perf_counter() - began
def ready():
    # Imports are done: what is held from here on belongs to the coder.
    global own, peak
    own = peak = anonymous()
    return mark()
"""
FINALE = """
done.set()
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"imported": imported, "loaded": loaded, "encoded": mark(), "anonymous": max(peak, anonymous()) - own,
                  "resident": resident, "checksum": checksum}))
"""
BODIES = {
    "unmix": """
import torch
from unmix.formats.loading import load
imported = ready()
coder = load(place)
loaded = mark()
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    checksum = float(coder.encode(torch.randn(rows, d, generator=generator)).values.sum())
""",
    "sae_lens": """
import torch
from sae_lens import SAE
imported = ready()
coder = SAE.load_from_disk(place, device="cpu")
loaded = mark()
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    checksum = float(coder.encode(torch.randn(rows, d, generator=generator)).sum())
""",
    "read": """
import torch
imported = ready()
with open(os.path.join(place, "sae_weights.safetensors"), "rb", buffering=0) as file:
    buffer = bytearray(2**24)
    while file.readinto(buffer):
        pass
loaded = mark()
checksum = 0.0
""",
}
CONVERT = """
from unmix.formats.loading import convert
imported = ready()
target, format = sys.argv[3:5]
convert(place, target, format)
loaded = mark()
checksum = 0.0
"""


def make(folder: Path, latents: int, d: int) -> None:
    """A jumprelu coder in SAELens' layout, its tensors written one at a time."""
    import torch

    from unmix.formats.lazy import Lazy
    from unmix.formats.stores.writing import write_safetensors

    generator = torch.Generator().manual_seed(0)

    def rows(n: int, m: int) -> Lazy:
        return Lazy(lambda: torch.randn(n, m, generator=generator).div_(d**0.5), torch.empty(n, m, device="meta"))

    cfg = {
        "architecture": "jumprelu", "d_in": d, "d_sae": latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.0.hook_resid_post", "model_name": "none", "sae_lens_version": "6.54.12"},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    write_safetensors(
        folder / "sae_weights.safetensors",
        {
            "W_enc": rows(d, latents), "W_dec": rows(latents, d),
            "b_enc": Lazy.of(torch.zeros(latents)), "b_dec": Lazy.of(torch.zeros(d)),
            "threshold": Lazy.of(torch.full((latents,), 2.0)),
        },
    )  # fmt: skip


def once(python: str, body: str, *arguments: str) -> dict[str, float]:
    """One process; its figures."""
    done = subprocess.run(
        [python, "-c", PRELUDE + body + FINALE, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def show(name: str, runs: list[dict[str, float]]) -> None:
    """Medians with their range."""

    def seconds(key: str, since: str = "") -> str:
        values = [run[key] - (run[since] if since else 0) for run in runs]
        return f"{statistics.median(values):6.2f} ({min(values):.2f}–{max(values):.2f})"

    memory = [f"{max(run[key] for run in runs) / 2**20:8,.0f}" for key in ("anonymous", "resident")]
    columns = [seconds("loaded", "imported"), seconds("encoded", "imported"), seconds("encoded"), *memory]
    print(f"{name:10}" + "".join(f"{column:>24}" for column in columns))


def main() -> None:
    """Alternate the contestants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--convert", default="", metavar="FORMAT")
    parser.add_argument("--work", default=None, help="a folder with room for the files; default: the system's own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder = Path(work) / "coder"
        make(folder, options.latents, options.width)
        largest = options.latents * options.width * 4
        print(f"{options.latents:,} latents × {options.width:,}: W_enc and W_dec of {largest / 2**20:,.0f} MiB each")
        names = ("read", "unmix", "sae_lens") if PEER.exists() else ("read", "unmix")
        pythons = {"read": sys.executable, "unmix": sys.executable, "sae_lens": str(PEER)}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for turn in range(options.repeats + 1):
            for name in names:
                found = once(pythons[name], BODIES[name], str(folder), str(options.width))
                if turn:  # the first round warms the page cache
                    runs[name].append(found)
        head = ("load s", "load + encode s", "with imports s", "anonymous MiB", "resident MiB")
        print(f"{'':10}" + "".join(f"{column:>24}" for column in head))
        for name in names:
            show(name, runs[name])
        if "sae_lens" in runs:
            ours, theirs = runs["unmix"][0]["checksum"], runs["sae_lens"][0]["checksum"]
            print(f"sums of the codes: unmix {ours:.6g}, sae_lens {theirs:.6g}")
        if options.convert:
            target = str(Path(work) / "converted")
            found = once(sys.executable, CONVERT, str(folder), str(options.width), target, options.convert)
            ratio = found["anonymous"] / largest
            print(
                f"convert to {options.convert}: {found['loaded'] - found['imported']:.1f} s, "
                f"anonymous peak {found['anonymous'] / 2**20:,.0f} MiB, {ratio:.2f} × the largest tensor"
            )


if __name__ == "__main__":
    main()
