"""What a training will need before it starts: memory of a rank, messages, time and cost. Arithmetic alone, no torch.

Every figure follows from the sizes and from the peaks that the makers state; the phases of a step follow each other, as
they do in the trainer, so their times add up. d: width, f = F / dictionary: latents of a rank, T = batch / data: tokens
of a rank, n = T·L0 / dictionary: (token, latent) pairs of a rank, w: weights of a rank. Numbers have 4 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from unmix.core.config import Config, Count

Precision = Literal["float32", "tf32", "bfloat16"]
FLOAT = 4
TILE = 32 * 2**20
"""Bytes of scores that are held at once, of 16 tokens at least."""
BINS = 2**16
"""Counters of one round of the search for batchtopk's border (`unmix.train.parallel.selection`)."""


@dataclass(frozen=True)
class Device:
    """A card by the peaks its maker states: bytes, operations a second (dense), bytes a second, one way a link."""

    memory: float
    float32: float
    tf32: float
    bfloat16: float
    bandwidth: float
    link: float
    """To the other cards of its machine."""
    network: float
    """To other machines, a card's share."""

    def product(self, precision: Precision) -> float:
        """Operations a second of a matrix product."""
        return {"float32": self.float32, "tf32": self.tf32, "bfloat16": self.bfloat16}[precision]


DEVICES = {
    "a100": Device(80e9, 19.5e12, 156e12, 312e12, 2.04e12, 300e9, 25e9),
    "h100": Device(80e9, 67e12, 494e12, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Device(141e9, 67e12, 494e12, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Device(180e9, 75e12, 1.12e15, 2.25e15, 7.7e12, 900e9, 50e9),
}
"""SXM models with NVLink, and one network card of 200 (A100) or 400 Gbit/s a card."""
STATE = {"adam": 8, "signum": 4, "schedule_free": 8, "muon": 4, "adam8bit": 2}
"""Bytes that an optimiser keeps a weight."""


class PlanConfig(Config):
    """What `unmix plan` reckons with; nothing else reads it."""

    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    gpus: PositiveInt = 1
    per_node: PositiveInt = 8
    """Cards of one machine."""
    width: PositiveInt | None = None
    """Width of every hook; default: what the model's own config says."""
    l0: PositiveFloat | None = None
    """Latents a token, for kinds without k."""
    dead: float = Field(default=0.1, ge=0, le=1)
    """Share of the latents that AuxK scores again."""
    precision: Precision = "float32"
    """Of the encoder's product. The trainer's is float32."""
    tile: Count = TILE
    """Bytes of scores that are held at once. The trainer's are 32 MiB."""
    efficiency: float = Field(default=0.5, gt=0, le=1)
    """Share of the stated peaks that is reached: what is expected, beside the bound."""
    latency: PositiveFloat = 2e-5
    """Seconds that a message takes however small it is."""
    price: PositiveFloat | None = None
    """Dollars a card-hour."""
    model_parameters: Count | None = None
    """Weights of the language model up to the last hook, for the cost of capturing."""


@dataclass(frozen=True)
class Shape:
    """One coder by its sizes."""

    name: str
    d_in: int
    d_out: int
    n_latents: int
    kind: str
    l0: float
    optimiser: str = "adam"
    same: bool = True
    """Whether it writes what it reads."""
    own_bias: bool = False
    skip: bool = False
    unit_norm: bool = True
    k_aux: int = 0
    """Dead latents a token in AuxK; 0 without it."""

    @property
    def vectors(self) -> int:
        """Numbers a latent beside its two rows: b_enc, and θ of jumprelu."""
        return 2 if self.kind == "jumprelu" else 1

    def whole(self) -> int:
        """Weights that every rank holds: b_dec, an input bias of its own, the skip."""
        return self.d_out + (self.d_in if self.own_bias else 0) + (self.d_in * self.d_out if self.skip else 0)


@dataclass(frozen=True)
class Layout:
    """Where a training runs: ranks along both axes, the card, the batch of all ranks."""

    data: int
    dictionary: int
    per_node: int
    device: Device
    batch: int

    @property
    def tokens(self) -> float:
        """T: tokens of a rank in a step."""
        return self.batch / self.data

    def speed(self, axis: str) -> float:
        """Bytes a second between neighbours along an axis: the network's where an axis leaves the machine."""
        reach = self.dictionary if axis == "dictionary" else self.data * self.dictionary
        return self.device.link if reach <= self.per_node else self.device.network


@dataclass(frozen=True)
class Message:
    """Collectives of one kind in a step."""

    what: str
    axis: Literal["data", "dictionary", "all"]
    count: int
    sent: float
    """Bytes that a rank sends (and receives) in all of them."""


@dataclass(frozen=True)
class Phase:
    """A part of a step: operations, bytes moved through the card's memory, and seconds at the stated peaks."""

    what: str
    flops: float
    moved: float
    seconds: float


def tile_rows(latents: float, tile: int = TILE) -> int:
    """Tokens scored at once, as `unmix.coder.sparse` cuts them."""
    return max(16, int(tile // (latents * FLOAT)))


def rank_weights(shape: Shape, layout: Layout) -> float:
    """w = f·(d_in + d_out + vectors) + what every rank holds."""
    f = shape.n_latents / layout.dictionary
    return f * (shape.d_in + shape.d_out + shape.vectors) + shape.whole()


def rank_memory(shapes: Sequence[Shape], layout: Layout, config: PlanConfig) -> dict[str, float]:
    """Bytes of a rank by purpose. Coders go forward and back one after the other, so the largest one's work counts.

    `activations`: input, centred input, three of the output (part, sum, gradient), and the target where it is not the
    input. `candidates`: T·k proposals (value and id), their k·dictionary gathered gates with a mark each, and the pairs
    kept (value, id, token, order: 32 bytes). `scores`: the tile. `auxk`: rows of dead latents with their gradients, one
    gradient of the size of the larger matrix, gathered gates with a mark each.
    """
    found = {"weights": 0.0, "gradients": 0.0, "optimiser": 0.0}
    works: list[dict[str, float]] = []
    for shape in shapes:
        w, T, parts = rank_weights(shape, layout), layout.tokens, layout.dictionary
        f = shape.n_latents / parts
        found["weights"] += w * FLOAT
        found["gradients"] += w * FLOAT
        found["optimiser"] += w * STATE[shape.optimiser]
        rows = 2 * shape.d_in + (3 if shape.same else 4) * shape.d_out
        proposed = T * shape.l0 * (8 + 5 * parts) if shape.kind == "topk" and parts > 1 else 0.0
        aux = 0.0
        if shape.k_aux:
            again = 2 * config.dead * f * (shape.d_in + shape.d_out) + f * max(shape.d_in, shape.d_out)
            aux = again * FLOAT + (T * shape.k_aux * 5 * parts if parts > 1 else 0.0)
        works.append(
            {
                "activations": T * rows * FLOAT,
                "candidates": proposed + 32 * T * shape.l0 / parts,
                "scores": tile_rows(f, config.tile) * f * FLOAT,
                "auxk": aux,
            }
        )
    return found | max(works, key=lambda work: sum(work.values()))


def step_messages(shape: Shape, layout: Layout, dead: float) -> list[Message]:
    """What a coder's ranks say to each other in a step. A ring of r ranks sends (r−1)/r of a sum's bytes twice.

    Gates: each rank hands T·k numbers on to all others of its row. Reconstructions and gradients are sums.
    """
    T, rows, columns = layout.tokens, layout.dictionary, layout.data
    every = rows * columns
    ring, ring_data, ring_all = 2 * (rows - 1) / rows, 2 * (columns - 1) / columns, 2 * (every - 1) / every
    found: list[Message] = []
    if rows > 1:
        if shape.kind == "topk":
            found.append(Message("gates of candidates", "dictionary", 1, (rows - 1) * T * shape.l0 * FLOAT))
        found.append(Message("partial reconstructions", "dictionary", 1, ring * T * shape.d_out * FLOAT))
        if shape.k_aux and dead > 0:
            k = min(shape.k_aux, dead * shape.n_latents)
            found.append(Message("gates of dead candidates", "dictionary", 1, (rows - 1) * T * k * FLOAT))
            found.append(Message("partial AuxK reconstructions", "dictionary", 1, ring * T * shape.d_out * FLOAT))
        found.append(Message("biases and counts", "dictionary", 4, ring * (shape.d_in + shape.whole()) * FLOAT))
    if shape.kind == "batchtopk" and every > 1:
        found.append(Message("counts of gates", "all", 4, ring_all * 2 * BINS * 8))
    if columns > 1:
        w = rank_weights(shape, layout)
        found.append(Message("gradients", "data", 4 + (shape.vectors - 1), ring_data * w * FLOAT))
        found.append(Message("which latents fired, losses", "data", 5, ring_data * shape.n_latents / rows))
    if every > 1:
        found.append(Message("flags and figures", "all", 3, ring_all * 40))
    return found


def step_phases(shape: Shape, layout: Layout, config: PlanConfig) -> list[Phase]:
    """The parts of a coder's step in order.

    Encoder product: 2·T·f·d_in operations, weights read once a tile of tokens. Scores: T·f numbers five times (written,
    bias added to them, read twice by the selection). Pairs: decode, gradient of the values and of both matrices, each n
    rows of d. Gradients: two matrices written, and for AuxK written and added once more. Optimiser: norm (1), clipping
    (2) and the step (adam 7) a weight, and 8 a decoder weight for the projection and the norm. Messages: bytes over the
    link of their axis, and a latency each. A phase takes the longer of its operations and its bytes.
    """
    device, T, f = layout.device, layout.tokens, shape.n_latents / layout.dictionary
    w, pairs = rank_weights(shape, layout), T * shape.l0 / layout.dictionary
    again = config.dead if shape.k_aux else 0.0
    steps = {"adam": 7.0, "signum": 5.0, "schedule_free": 7.0, "muon": 5.0, "adam8bit": 4.0}[shape.optimiser]
    held = 8.0 * f * shape.d_out if shape.unit_norm else 0.0
    product = 2 * T * f * shape.d_in
    rows = pairs * (shape.d_in + 3 * shape.d_out)
    aux_rows = T * min(shape.k_aux, again * shape.n_latents) / layout.dictionary * (shape.d_in + 3 * shape.d_out)
    matrices = f * (shape.d_in + shape.d_out)
    tiles_again = math.ceil(T / tile_rows(again * f, config.tile)) if again else 0
    both = [
        ("encoder product", product, f * shape.d_in * math.ceil(T / tile_rows(f, config.tile))),
        ("scores and selection", 0.0, 5 * T * f),
        ("codes and their gradients", 2 * rows, rows + matrices),
        (
            "AuxK", again * product + 2 * aux_rows,
            again * (5 * T * f + 4 * matrices) + again * f * shape.d_in * tiles_again + aux_rows + (
                3 * matrices if again else 0.0
            ),
        ),
        ("optimiser", 0.0, w * (3 + steps) + held),
    ]  # fmt: skip
    found: list[Phase] = []
    for what, flops, numbers in both:
        peak = device.product(config.precision) if what in ("encoder product", "AuxK") else device.float32
        found.append(Phase(what, flops, numbers * FLOAT, max(flops / peak, numbers * FLOAT / device.bandwidth)))
    messages = step_messages(shape, layout, config.dead)
    seconds = sum(m.sent / layout.speed(m.axis) + m.count * config.latency for m in messages)
    found.append(Phase("messages", 0.0, 0.0, seconds))
    return [phase for phase in found if phase.seconds > 0]


@dataclass(frozen=True)
class Plan:
    """A training on paper."""

    layout: Layout
    shapes: tuple[Shape, ...]
    memory: dict[str, float]
    messages: list[Message]
    phases: list[Phase]
    steps: int
    tokens: float
    config: PlanConfig
    cache: float
    """Bytes of the activation cache on disk."""
    checkpoint: float
    """Bytes of one checkpoint on disk: weights and optimiser of the whole dictionary."""
    coder: float
    """Bytes of the finished coders; rank 0 holds the largest of them whole in the machine's memory."""

    @property
    def ranks(self) -> int:
        """Cards."""
        return self.layout.data * self.layout.dictionary

    @property
    def used(self) -> float:
        """Bytes of a rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a tenth of the card is left for what torch keeps."""
        return self.used <= 0.9 * self.layout.device.memory

    @property
    def seconds(self) -> float:
        """Of a step at the stated peaks: no step is shorter."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def bound(self) -> float:
        """Tokens a second, at most."""
        return self.layout.batch / self.seconds

    @property
    def hours(self) -> float:
        """Of the whole training, as is to be expected: at `efficiency` of the peaks."""
        return self.steps * self.seconds / self.config.efficiency / 3600

    @property
    def capture_hours(self) -> float | None:
        """2 operations a weight and token on one card in bfloat16, at `efficiency`; None where nobody says the size."""
        if self.config.model_parameters is None:
            return None
        peak = self.layout.device.bfloat16 * self.config.efficiency
        return 2 * self.config.model_parameters * self.tokens / peak / 3600

    @property
    def cost(self) -> float | None:
        """Dollars of the training's card-hours."""
        return None if self.config.price is None else self.hours * self.ranks * self.config.price


def make_plan(
    shapes: Sequence[Shape], layout: Layout, config: PlanConfig, tokens: float, epochs: float, cached_width: int
) -> Plan:
    """Add it all up: `tokens` of text, seen `epochs` times; `cached_width` numbers a token of 2 bytes lie on disk."""
    memory = rank_memory(shapes, layout, config)
    messages: dict[tuple[str, str], Message] = {}
    phases: dict[str, Phase] = {}
    for shape in shapes:
        for m in step_messages(shape, layout, config.dead):
            old = messages.get((m.what, m.axis), Message(m.what, m.axis, 0, 0.0))
            messages[m.what, m.axis] = Message(m.what, m.axis, old.count + m.count, old.sent + m.sent)
        for p in step_phases(shape, layout, config):
            old_p = phases.get(p.what, Phase(p.what, 0.0, 0.0, 0.0))
            phases[p.what] = Phase(p.what, old_p.flops + p.flops, old_p.moved + p.moved, old_p.seconds + p.seconds)
    alone = Layout(1, 1, layout.per_node, layout.device, layout.batch)
    whole = [rank_weights(shape, alone) for shape in shapes]
    kept = sum(w * (FLOAT + STATE[shape.optimiser]) for w, shape in zip(whole, shapes, strict=True))
    return Plan(
        layout, tuple(shapes), memory, list(messages.values()), list(phases.values()),
        max(1, int(tokens * epochs) // layout.batch), tokens, config, 2.0 * tokens * cached_width, kept,
        sum(whole) * FLOAT,
    )  # fmt: skip


def smallest_mesh(shapes: Sequence[Shape], batch: int, config: PlanConfig) -> Layout:
    """The fewest slices of the dictionary that fit on the cards, as many slices of the batch as are left.

    Where nothing fits, every card holds a slice of the dictionary.
    """
    device, n = DEVICES[config.gpu], config.gpus
    choices = [p for p in range(1, n + 1) if n % p == 0 and all(shape.n_latents % p == 0 for shape in shapes)]
    for parts in choices:
        layout = Layout(n // parts, parts, config.per_node, device, batch)
        if sum(rank_memory(shapes, layout, config).values()) <= 0.9 * device.memory and batch % (n // parts) == 0:
            return layout
    return Layout(n // choices[-1], choices[-1], config.per_node, device, batch)
