"""A top-k coder's step on a CUDA card, against the bfloat16 product of its encoder in the same rounds.

    python -m benchmarks.gpu [--quick] [--shape 2304,65536,64,8192] [--rounds 12] [--minutes 25] [--only step]
    python -m benchmarks.gpu --compile     # without a card: every kernel to machine code; registers, spills
    python -m benchmarks.gpu --model       # without a card: the arithmetic of each shape

Prints a Markdown table a shape: milliseconds, times the product, peak memory above what the weights hold. Contestants
take turns in shuffled rounds; `--quick` is five rounds without peers and stays below eight minutes. Without a card the
command says so and ends with 3. Needs the package triton; SAELens and sparsify are measured where they can be imported.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu_dense import DenseStep
from benchmarks._timing import Spread, alternate, table
from benchmarks.steps.gpu_peers import peers
from unmix.coder.kernels import encode, plain
from unmix.coder.kernels.adam import Adam, Dictionary, Row
from unmix.coder.kernels.decode import decode, residual
from unmix.coder.kernels.fused import fused_topk_step
from unmix.coder.kernels.gradients import Ending, latent_gradients
from unmix.coder.kernels.launching import WIDE, available
from unmix.coder.kernels.pairs import by_latent
from unmix.coder.kernels.rules import Found, TopRule

SHAPES = ("768,24576,32,8192", "2304,65536,64,8192", "4096,131072,64,8192", "4096,131072,64,32768")
BASE = "product, bfloat16"
LOW = torch.bfloat16
DEVICE = "cuda"


@dataclass(frozen=True)
class Shape:
    """Width, latents, codes a token, tokens a step."""

    d: int
    n_latents: int
    k: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`d,F,k,tokens`."""
        return cls(*(int(part) for part in text.split(",")))

    def flops(self) -> float:
        """Of the encoder's product."""
        return 2.0 * self.d * self.n_latents * self.tokens

    def bytes(self) -> dict[str, float]:
        """What each stage moves at least: through L2 for what is gathered, from memory for what is read in order."""
        pairs, weights = self.tokens * self.k, self.d * self.n_latents
        sample = self.n_latents // encode.STRIDE
        rank = encode.rank_of(self.k, sample, self.n_latents)
        return {
            "product": 2.0 * (weights + self.tokens * (self.d + self.n_latents)),
            "candidates": 16.0 * self.tokens * rank * self.n_latents / sample,
            "decode": 2.0 * pairs * self.d,
            "backward": 4.0 * pairs * self.d,
            "gradients written": 8.0 * weights,
            "Adam at once": 2 * 26.0 * weights,
            "dense pre-activations": 4.0 * self.tokens * self.n_latents,
        }


class Bench:
    """Weights and a batch on the card, and everything that is measured on them."""

    def __init__(self, shape: Shape) -> None:
        """Rows that a few latents make up, frequent ones among them, with noise: some latents fire very often."""
        self.shape = shape
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=DEVICE, generator=generator)

        rows = torch.nn.functional.normalize(normal(shape.n_latents, shape.d), dim=-1)
        often = 1.0 / torch.arange(20, shape.n_latents + 20, device=DEVICE).float()
        self.x = 0.3 * normal(shape.tokens, shape.d)
        for _ in range(16):
            ids = torch.multinomial(often, shape.tokens, replacement=True, generator=generator)
            self.x += rows[ids] * normal(shape.tokens, 1).abs()
        spare = Row.fresh(rows, LOW, spare=True)
        zeros = torch.zeros(shape.n_latents, device=DEVICE)
        self.params = Dictionary(Row.fresh(rows.clone(), LOW), spare, Row.fresh(zeros))
        self.b_dec = Row.fresh(torch.zeros(shape.d, device=DEVICE))
        self.variance = float((self.x - self.x.mean(0)).square().sum(-1).mean())
        self.low = self.x.to(LOW)
        self.rule = TopRule(shape.k)
        self.steps = 0
        self.found = self.encode()
        self.values = self.found.z.relu()
        self.floor = self.floors()
        self.counts, self.room = self.candidates()
        self.pairs = by_latent(self.found.indices, self.found.offsets, shape.n_latents)

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """The encoder that is scored with."""
        assert self.params.enc.low is not None
        return self.params.enc.low

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """The decoder's copy."""
        assert self.params.dec.low is not None
        return self.params.dec.low

    def encode(self) -> Found:
        """Encode-only."""
        return encode.top_codes(self.low, self.W_enc, self.params.bias.weight, None, self.rule)

    def wide(self) -> Found:
        """The same with the wider tile."""
        return encode.top_codes(self.low, self.W_enc, self.params.bias.weight, None, self.rule, tiles=WIDE)

    def product(self) -> None:
        """torch's own product, into memory that is there; in parts where 4 GiB would not hold it."""
        rows = max(1, 2**31 // self.shape.n_latents)
        buffer = self._buffer(min(rows, self.shape.tokens))
        for part in self.low.split(rows):
            torch.mm(part, self.W_enc.T, out=buffer[: len(part)])

    def _buffer(self, rows: int) -> Tensor:
        if not hasattr(self, "_kept") or len(self._kept) < rows:
            self._kept = torch.empty(rows, self.shape.n_latents, dtype=LOW, device=DEVICE)
        return self._kept

    def floors(self) -> Tensor:
        """The sample's product and the floors from it."""
        sample = -(-self.shape.n_latents // encode.STRIDE)
        rank = encode.rank_of(self.shape.k, sample, self.shape.n_latents)
        return encode.floors(self.low, self.W_enc, self.params.bias.weight, None, self.rule, rank, encode.STRIDE)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """The product with its epilogue alone, for floors that stand."""
        n = self.shape.n_latents
        sample = -(-n // encode.STRIDE)
        room = encode.room_for(self.shape.k, encode.rank_of(self.shape.k, sample, n), sample, n)
        bias = self.params.bias.weight
        return encode.candidates(self.low, self.W_enc, bias, None, self.floor, room, False, False, False, None)

    def pick(self) -> None:
        """The exact choice among candidates that stand."""
        encode.pick(self.room, self.counts, None, self.rule)

    def decode(self) -> Tensor:
        """Decode alone."""
        return decode(self.values, self.W_dec, self.found.indices, self.found.offsets, self.b_dec.weight)

    def sort(self) -> None:
        """Pairs by latent."""
        by_latent(self.found.indices, self.found.offsets, self.shape.n_latents)

    def backward(self, ending: Ending | None = None) -> None:
        """The latent-major pass on pairs that are sorted."""
        f = self.found
        latent_gradients(
            f.indices, f.offsets, self.values, self.low, self.W_dec, self.low, None, self.shape.n_latents, True, 1e-6,
            ending, self.pairs,
        )  # fmt: skip

    def backward_and_adam(self) -> None:
        """The same, ended by the optimiser's step (of rate 0: the weights stay)."""
        self.backward(Ending(project=True, params=self.params, adam=Adam(0.0, 1), unit=True))

    def forward_backward(self) -> None:
        """A step up to gradients in memory, without the optimiser."""
        found = self.encode()
        values = found.z.relu()
        error, _ = residual(values, self.W_dec, found.indices, found.offsets, self.b_dec.weight, self.x, LOW)
        scale = 2.0 / (self.shape.tokens * self.variance)
        latent_gradients(
            found.indices, found.offsets, values, error, self.W_dec, self.low, None, self.shape.n_latents, True, scale
        )

    def step(self, clip: float | None = None) -> None:
        """A whole training step."""
        self.steps += 1
        adam = Adam(1e-5, self.steps)
        fused_topk_step(self.params, self.b_dec, self.x, self.shape.k, adam, self.variance, clip)

    def contestants(self, quick: bool) -> dict[str, Callable[[], object]]:
        """By the name in the table."""
        dense = DenseStep(self.x, self.params.dec.weight, self.shape.k, self.variance)
        made: dict[str, Callable[[], object]] = {
            BASE: self.product, "encode": self.encode, "encode, wide tile": self.wide, ". floors": self.floors,
            ". candidates": self.candidates, ". pick": self.pick,
            "decode": self.decode, ". pairs by latent": self.sort, "backward": self.backward,
            "backward with Adam": self.backward_and_adam, "step without optimiser": self.forward_backward,
            "step": self.step, "step, clipped": lambda: self.step(1.0),
        }  # fmt: skip
        if not quick or self.shape.tokens <= 8192:
            made["dense, torch.compile"] = dense
        return made if quick else {**made, **peers(self.shape, self.x)}

    def agreement(self, rows: int = 512) -> str:
        """How the kernel's latents compare with the plain path's on some rows."""
        ids, _ = plain.top(self.low[:rows], self.W_enc, self.params.bias.weight, None, self.rule)
        same = (self.found.indices.view(-1, self.shape.k)[:rows] == ids).all(1).float().mean()
        mean = float(self.counts.float().mean())
        return (
            f"{mean:.0f} candidates a token, at most {int(self.counts.max())} of room for {self.room.shape[1]}; "
            f"{100 * float(same):.2f} % of {len(ids)} tokens have the plain path's latents (sums in another order may "
            f"swap near ties); {self.found.again} of {self.shape.tokens} tokens were done again"
        )


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Seconds on the card."""

    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return run


def starting(contestants: dict[str, Callable[[], object]], until: float) -> Iterator[tuple[str, Any, float, str]]:
    """`(name, work, peak bytes of one run above what was held, why it cannot run)`."""
    for name, work in contestants.items():
        if time.monotonic() > until:
            yield name, None, 0.0, "no time left"
            continue
        try:
            for _ in range(2):
                work()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            yield name, work, float(torch.cuda.max_memory_allocated() - held), ""
        except (RuntimeError, ImportError, AssertionError) as error:
            torch.cuda.empty_cache()
            yield name, None, 0.0, str(error).strip().splitlines()[0][:160] if str(error).strip() else repr(error)


def measure(shape: Shape, rounds: int, quick: bool, only: str, until: float) -> dict[str, Any]:
    """Every contestant that starts, in shuffled rounds."""
    bench = Bench(shape)
    wanted = {n: w for n, w in bench.contestants(quick).items() if n == BASE or not only or only in n}
    runs: dict[str, Callable[[], float]] = {}
    peak: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, work, size, why in starting(wanted, until):
        if why:
            absent[name] = why
        else:
            runs[name], peak[name] = timed(work), size
    times = alternate(runs, rounds)
    return {"shape": shape, "times": times, "peak": peak, "absent": absent, "agreement": bench.agreement()}


def report(result: dict[str, Any]) -> str:
    """Markdown of one shape."""
    shape, times = result["shape"], result["times"]
    rows = []
    for name, seconds in times.items():
        ratio = Spread.of([mine / base for mine, base in zip(seconds, times[BASE], strict=True)])
        rows.append([name, Spread.of(seconds).show(3, 1000), ratio.show(), f"{result['peak'][name] / 2**20:,.0f}"])
    speed = shape.flops() / Spread.of(times[BASE]).median / 1e12
    head = f"### d {shape.d}, F {shape.n_latents:,}, k {shape.k}, {shape.tokens:,} tokens"
    lines = [head, "", table(["", "ms", "times the product", "peak MiB"], rows), ""]
    lines += [f"- the product ran at {speed:,.0f} TFLOP/s", f"- {result['agreement']}"]
    lines += [f"- {name} did not run: {why}" for name, why in result["absent"].items()]
    return "\n".join(lines)


def model(shape: Shape, tera_flops: float = 790.0, tera_bytes: float = 4.0) -> str:
    """The arithmetic of a shape, at rates that a card has to confirm."""
    product = shape.flops() / tera_flops / 1e9
    parts = [
        f"{name} {size / 1e9:.2f} GB ({size / tera_bytes / 1e9 / product:.2f}×)" for name, size in shape.bytes().items()
    ]
    return f"{shape}: product {shape.flops() / 1e12:.2f} TFLOP = {product:.2f} ms; " + ", ".join(parts)


def versions() -> str:
    """Card, date and versions."""
    found = []
    for package in ("torch", "triton", "unmix", "sae-lens", "eai-sparsify"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{torch.cuda.get_device_name()}, {today}, CUDA {torch.version.cuda}, {', '.join(found)}"


def main() -> int:
    """Measure every shape asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five rounds, no peers, eight minutes at most")
    parser.add_argument("--shape", action="append", help="d,F,k,tokens (may be repeated)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=25.0, help="start nothing new after so long")
    parser.add_argument("--only", default="", help="contestants whose name holds this, and the product")
    parser.add_argument("--compile", action="store_true", help="compile every kernel for sm_90; needs no card")
    parser.add_argument("--model", action="store_true", help="bytes and flops of the shapes; needs no card")
    parser.add_argument("--json", type=Path, help="write every single measurement here too")
    options = parser.parse_args()
    shapes = [Shape.parse(text) for text in options.shape or SHAPES]
    if options.model:
        print("\n".join(model(shape) for shape in shapes))
        return 0
    if not available():
        print("the kernels need the package triton: pip install triton", file=sys.stderr)
        return 3
    if options.compile:
        from benchmarks._gpu_compile import everything

        print("\n".join(everything()))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA card here: nothing was measured (--compile and --model need none)", file=sys.stderr)
        return 3
    if options.quick:
        options = argparse.Namespace(**{**vars(options), "rounds": min(options.rounds, 5), "minutes": 5.5})
    until = time.monotonic() + 60 * options.minutes
    print(f"Measured on {versions()}; medians of {options.rounds} shuffled rounds (10th–90th percentile).\n")
    results = []
    for shape in shapes:
        if time.monotonic() > until:
            print(f"### {shape}: no time left\n")
            continue
        results.append(measure(shape, options.rounds, options.quick, options.only, until))
        print(report(results[-1]) + "\n", flush=True)
        torch.compiler.reset()  # what was compiled holds on to the weights of this shape
        torch.cuda.empty_cache()
    if options.json:
        plainly = [{**r, "shape": vars(replace(r["shape"]))} for r in results]
        options.json.write_text(json.dumps(plainly, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
