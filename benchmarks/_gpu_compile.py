"""Every kernel to machine code for sm_90 at the issue's widths, on any machine: what the assembler says of each."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unmix.coder.kernels import backward, decoding, scoring, selecting
from unmix.coder.kernels.launching import FULL, HALF, WIDE, Tiles, pass_shape

POINTERS = {"b": "*bf16", "f": "*fp32", "i": "*i32", "l": "*i64", "c": "*i8"}
# Sizes that are multiples of 16 in the shapes measured: the compiler may then read 16 bytes at once.
ROUND = {"d", "d_in", "d_out", "stride", "stride_x", "stride_w", "stride_dec", "capacity", "n_tokens", "n_latents"}
ASSEMBLERS = ("ptxas", "ptxas-blackwell")


@dataclass(frozen=True)
class Variant:
    """A kernel with its settings; `pointers` give every pointer's letter, None where it is not used."""

    kernel: Any
    pointers: dict[str, str | None]
    settings: dict[str, Any]
    options: dict[str, int]
    note: str = ""
    floats: tuple[str, ...] = field(default=())


def score(tiles: Tiles, letter: str, name: str) -> Variant:
    """Of the score kernel."""
    flags = {"PER_LATENT": False, "HAS_SCALE": False, "ON_SCORES": False, "MAGNITUDE": False, "UPCAST": False}
    block = {"BM": tiles.tokens, "BN": tiles.latents, "BK": tiles.inner, "GROUP": tiles.group}
    pointers = {"x": letter, "w": letter, "b": "f", "factor": None, "floor": "f", "counts": "i", "room": "l"}
    return Variant(
        scoring.score_kernel,
        pointers,
        {**flags, **block, "EVEN_K": True, "EVEN_N": True, "ASSEMBLED": True},
        tiles.options(),
        name,
    )


def variants() -> Iterator[Variant]:
    """All of them."""
    yield score(HALF, "b", "bfloat16")
    yield score(WIDE, "b", "bfloat16, wide")
    yield score(FULL, "f", "float32")
    flags = {"HAS_SCALE": False, "MAGNITUDE": False}
    sample = {"sample": "b", "factor": None, "floors": "f"}
    yield Variant(scoring.floor_kernel, sample, {**flags, "POSITIVE": False, "N": 2048}, {"num_warps": 4})
    picked = {"room": "l", "counts": "i", "factor": None, "scratch": "l", "ids_out": "i", "z_out": "f", "again": "c"}
    for room, k, warps in ((512, 32, 1), (1024, 64, 4)):
        settings = {**flags, "CAPACITY": room, "K": k}
        yield Variant(selecting.select_kernel, picked, settings, {"num_warps": warps}, f"k {k}, room {room}")
    ragged = {"room": "l", "counts": "i", "offsets": "l", "ids_out": "i", "z_out": "f"}
    yield Variant(selecting.collect_kernel, ragged, {"WIDTH": 256}, {"num_warps": 1})
    read = {"values": "f", "table": "b", "indices": "i", "offsets": "l", "bias": "f", "target": "f", "out": "b"}
    settings = {"HAS_BIAS": True, "RESIDUAL": True, "BLOCK": 1024, "ROWS": 4}
    yield Variant(decoding.decode_kernel, {**read, "squares": "f"}, settings, {"num_warps": 4})
    yield from _passes()


def _passes() -> Iterator[Variant]:
    """The latent-major pass with and without the step at its end, and the second pass."""
    floats = "values grad_z part_dec part_enc part_b g_b p_dec p_enc p_b m_dec m_enc m_b v_dec v_enc v_b rates clip"
    common: dict[str, str | None] = dict.fromkeys(floats.split(), "f")
    common |= {"pieces": "l", "order": "i", "tokens": "i", "extra": None, "squares": None, "split": "l"}
    common |= dict.fromkeys(("grad_y", "w_dec", "x", "low_dec", "low_enc"), "b")
    for width in (1024, 4096):
        warps = pass_shape(width).warps
        for adam in (False, True):
            ends = dict.fromkeys(("PROJECT", "ADAM", "UNIT", "LOW_DEC", "LOW_ENC"), adam)
            flags = {"HAS_DEC": True, "HAS_ENC": True, "SQUARES": False, **ends, "OUT": width, "IN": width}
            pointers = common | dict.fromkeys(("g_dec", "g_enc"), None if adam else "f")
            note = f"rows of {width}" + (", Adam" if adam else "")
            more = {"HAS_EXTRA": False, "RELU": True, "TOKENS": pass_shape(width).tokens}
            yield Variant(backward.latent_kernel, pointers, flags | more, {"num_warps": warps}, note, ("scale",))
            yield Variant(backward.sum_kernel, pointers, flags, {"num_warps": warps}, note)


def compiled(variant: Variant) -> str:
    """One line: registers a thread, spills, shared memory, tensor-core instructions."""
    kernel, signature, constants, hints = variant.kernel, {}, dict(variant.settings), {}
    for place, name in enumerate(kernel.arg_names):
        if name in variant.settings:
            signature[name] = "constexpr"
        elif name in variant.pointers:
            letter = variant.pointers[name]
            signature[name] = "constexpr" if letter is None else POINTERS[letter]
            if letter is None:
                constants[name] = None
        else:
            signature[name] = "fp32" if name in variant.floats else "i32"
        if signature[name].startswith("*") or name in ROUND:
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=hints)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=variant.options)
    text = made.asm["ptx"]
    name = f"{kernel.__name__} {variant.note}".strip()
    return f"{name}: {_assembled(text)}; shared {made.metadata.shared} B; {text.count('wgmma.mma_async')} wgmma"


def _assembled(text: str) -> str:
    """What the first of Triton's assemblers that knows the text's version says of it."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(text)
        for name in ASSEMBLERS:
            command = [str(folder / name), "-v", "--gpu-name", "sm_90a", str(file), "-o", str(file.with_suffix(".o"))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = [line for line in (done.stderr + done.stdout).splitlines() if "registers" in line or "spill" in line]
            if done.returncode == 0:
                return ", ".join(line.split(":")[-1].split(", used")[0].strip() for line in said)
    return "not assembled"


def everything() -> Iterator[str]:
    """A line a variant, as each is done."""
    for variant in variants():
        yield compiled(variant)
