"""The local replacement model of one prompt: transcoders in place of MLPs, attention patterns and norms held.

With those held, every pre-activation and every logit is a sum over what was written earlier: latents, what transcoders
miss (error nodes), token embeddings, and constants. One backward pass from a target gives its row of that sum, the
direct effects on it: the gradient at each place that is written, times what each node writes there. No path leads
through another MLP. (Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models", §3.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmix.core.errors import ModelError
from unmix.lm.forward import Edit, as_inputs, attach_read, attach_write, run
from unmix.lm.graphs.attention import AttentionCall, watching
from unmix.lm.graphs.norms import find_norms, freeze_norms
from unmix.lm.graphs.transcoders import Active, Coders, Transcoder, directions, place, skipped, written
from unmix.lm.points import split_name
from unmix.lm.tokens import policy_mask

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel
    from unmix.lm.points import Hook
    from unmix.lm.sites import Pass, Site

EMBEDDINGS = "blocks.0.resid_pre"
LAST = "final_norm"
MEMORY = 2 << 30
CHUNK = 1 << 24
"""Values held at a time while the effects of one coder's latents are gathered."""


@dataclass(frozen=True)
class Target:
    """What a row is about: gradient `vector` of a number with respect to `hook`'s activation at `position`."""

    parts: tuple[tuple[str, Tensor], ...]
    """(hook, vector [d]) for each hook that the target reads."""
    position: int
    value: float


class Flow:
    """A forward pass whose gradients run only along frozen attention, frozen norms and the stream."""

    def __init__(self, reads: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
        self.reads, self.leaves = reads, leaves

    @property
    def batch(self) -> int:
        """How many targets one backward pass takes."""
        return next(iter(self.leaves.values())).shape[0]

    def back(self, outputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients at every place that is written, by hook: {hook: [batch, pos, d]}; absent where there is none."""
        found = torch.autograd.grad(
            list(outputs), list(self.leaves.values()), list(vectors), retain_graph=True, allow_unused=True
        )
        grads: list[Tensor | None] = list(found)
        return {name: grad.float() for name, grad in zip(self.leaves, grads, strict=True) if grad is not None}


class LocalReplacement:
    """One prompt under the replacement model. Columns of a row: latents of each coder, errors, embeddings."""

    def __init__(self, lm: LanguageModel, coders: Coders, prompt: str | Tensor, memory: int = MEMORY) -> None:
        """`prompt`: a text or ids [pos]. `memory`: bytes that the stored pass of a batch of targets may take.

        Raises `ModelError` where coders, model or prompt do not fit, before any pass where that can be known.
        """
        if not lm.is_transformers:
            raise ModelError(f"{lm.name}: attribution graphs need a Hugging Face language model")
        self.lm = lm
        self.transcoders = place(lm, coders)
        policy = self.transcoders[0].coder.config.input_policy
        self.tokens: Int[Tensor, " pos"] = as_inputs(lm, prompt, policy)[0]
        self.memory = memory
        self.norms = find_norms(lm)
        self.outputs = self._outputs()
        self.active: dict[str, Active] = {}
        self.errors: dict[str, Float[Tensor, "pos d"]] = {}
        self.held: dict[str, Float[Tensor, "pos d"]] = {}
        self.counts: dict[str, Bool[Tensor, " pos"]] = {}
        self._base_pass()

    # what the nodes are ----------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)

    @cached_property
    def starts(self) -> dict[str, int]:
        """First column of each coder's latents, of each output's errors (by hook) and of the embeddings."""
        starts: dict[str, int] = {}
        column = 0
        for name, active in self.active.items():
            starts[f"coder {name}"] = column
            column += len(active)
        for hook in self.outputs:
            starts[hook] = column
            column += self.length
        starts[EMBEDDINGS] = column
        return starts

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.starts[EMBEDDINGS] + self.length

    @property
    def n_latents(self) -> int:
        """Columns that are latents; they come first."""
        return sum(len(active) for active in self.active.values())

    def locate(self, column: int) -> tuple[Transcoder, int]:
        """The coder of a latent's column, and the entry's number in its `Active`."""
        for transcoder in self.transcoders:
            start = self.starts[f"coder {transcoder.name}"]
            if start <= column < start + len(self.active[transcoder.name]):
                return transcoder, column - start
        raise IndexError(f"column {column} is no latent's")

    def latent_target(self, column: int) -> Target:
        """The value of an active latent as a target."""
        transcoder, entry = self.locate(column)
        active = self.active[transcoder.name]
        vector = directions(transcoder.coder, active, torch.tensor([entry], device=active.latents.device))[0]
        parts = tuple(
            (hook.name, part)
            for hook, part in zip(transcoder.reads, vector.split(list(transcoder.read_widths)), strict=True)
        )
        return Target(parts, int(active.positions[entry]), float(active.values[entry]))

    def logit_target(self, token: int, against: Tensor | None = None) -> Target:
        """A next-token logit (before any soft cap) minus the mean of all, or minus the logit of id `against` [1].

        The head's bias, where it has one, is a constant of the value.
        """
        rows = self.lm.unembedding
        base = self._mean_row if against is None else rows[int(against)].float()
        vector = (rows[token].float() - base) * self.lm.logit_scale
        bias = self.lm.unembedding_bias
        constant = 0.0
        if bias is not None:
            own = bias.float() * self.lm.logit_scale
            constant = float(own[token] - (own.mean() if against is None else own[int(against)]))
        return Target(((LAST, vector),), self.length - 1, float(vector @ self.last[-1].float()) + constant)

    @cached_property
    def _mean_row(self) -> Float[Tensor, " d"]:
        return self.lm.unembedding.mean(0, dtype=torch.float32)

    # rows ------------------------------------------------------------------------------------------------------

    def rows(self, targets: Sequence[Target]) -> Float[Tensor, "targets columns"]:
        """Direct effects of every node on every target. A row and the target's constants add up to its value."""
        flow = self.flow
        found: list[Tensor] = []
        for start in range(0, len(targets), flow.batch):
            batch = targets[start : start + flow.batch]
            vectors: dict[str, Tensor] = {}
            for row, target in enumerate(batch):
                for hook, vector in target.parts:
                    if hook not in vectors:
                        vectors[hook] = torch.zeros_like(flow.reads[hook])
                    vectors[hook][row, target.position] += vector.to(flow.reads[hook].dtype)
            grads = flow.back([flow.reads[hook] for hook in vectors], list(vectors.values()))
            found.append(self.effects(grads)[: len(batch)])
        return torch.cat(found) if found else torch.zeros(0, self.columns)

    def effects(self, grads: dict[str, Tensor]) -> Float[Tensor, "batch columns"]:
        """What each node adds to the targets behind `grads` {hook: [batch, pos, d]}."""
        batch = next(iter(grads.values())).shape[0]
        out = torch.zeros(batch, self.columns)
        for transcoder in self.transcoders:
            begin = self.starts[f"coder {transcoder.name}"]
            self._latent_effects(transcoder, grads, out[:, begin : begin + len(self.active[transcoder.name])])
        for hook, vectors in (*self.errors.items(), (EMBEDDINGS, self.embeddings)):
            if hook in grads:
                begin = self.starts[hook]
                out[:, begin : begin + self.length] = torch.einsum("bpd,pd->bp", grads[hook], vectors.float()).cpu()
        return out

    def _latent_effects(self, transcoder: Transcoder, grads: dict[str, Tensor], out: Tensor) -> None:
        active = self.active[transcoder.name]
        hooks = [(i, hook.name) for i, hook in enumerate(transcoder.writes) if hook.name in grads]
        if not hooks or not len(active):
            return
        batch = out.shape[0]
        step = max(1, CHUNK // (batch * max(transcoder.coder.config.parts())))
        for start in range(0, len(active), step):
            which = torch.arange(start, min(start + step, len(active)), device=active.latents.device)
            parts = transcoder.parts(written(transcoder.coder, active, which))
            positions = active.positions[which]
            for i, hook in hooks:
                effect = torch.einsum("bnd,nd->bn", grads[hook][:, positions], parts[i])
                out[:, start : start + len(which)] += effect.cpu()

    # passes ----------------------------------------------------------------------------------------------------

    @cached_property
    def flow(self) -> Flow:
        """The pass that rows are taken from."""
        return self.forward(self.copies)

    @cached_property
    def copies(self) -> int:
        """As many of the prompt as the memory allows a stored pass (at most 64)."""
        return max(1, min(64, self.memory // max(1, self._measured())))

    def forward(
        self, copies: int, watch: Callable[[int, AttentionCall], None] | None = None, also: Sequence[str] = ()
    ) -> Flow:
        """One pass with gradients over `copies` of the prompt.

        `watch(layer, call)` is shown each layer's queries, keys and values before patterns are held; `also`: hooks
        whose activations join `reads`.
        """
        reads: dict[str, Tensor] = {}
        leaves: dict[str, Tensor] = {}
        layers = 0
        wanted = {hook.name: hook for one in self.transcoders for hook in one.reads}
        wanted |= {name: self.lm.hook(name) for name in (LAST, *also)}

        def hold(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal layers
            if watch is not None:
                watch(layers, call)
            layers += 1
            return call.query.detach(), call.key.detach(), call.value

        def prepare(current: Pass) -> None:
            freeze_norms(current, self.norms)
            for hook in (EMBEDDINGS, *self.outputs):
                attach_write(current, self.lm.hook(hook), self._leaf(hook, leaves, reads))
            for name, hook in wanted.items():
                self._read(current, hook, lambda x, name=name: reads.__setitem__(name, x))
            for site in self._mlp_inputs:
                # Its output is cut, so a graph of what happens inside would be kept for nothing.
                current.write(site, lambda x: x.detach())

        tokens = self.tokens.unsqueeze(0).expand(copies, -1)
        with torch.enable_grad(), watching(hold):
            run(self.lm, tokens, prepare, logits=False)
        if layers != self.lm.n_layers:
            raise ModelError(f"{self.lm.name}: {layers} of {self.lm.n_layers} layers have attention that can be held")
        return Flow(reads, leaves)

    def _read(self, current: Pass, hook: Hook, sink: Callable[[Tensor], None]) -> None:
        """As `attach_read`; what a norm makes of its input before its gain comes from the norm that is held."""
        if hook.view is not None and hook.view.apart:
            parts = self.norms[hook.read.path]
            gain = parts.gain.where(parts.gain != 0, torch.inf)
            plain = self.lm.hook(hook.name.partition("~")[0])
            self._read(current, plain, lambda y: sink((y - parts.bias) / gain))
        elif hook.read in self._mlp_inputs and hook.head is None:
            # Readers come after every writer, and the last of those takes the gradient away.
            current.write(hook.read, lambda x: sink(x if hook.view is None else hook.view.show(x)))
        else:
            attach_read(current, hook, sink)

    @cached_property
    def _mlp_inputs(self) -> set[Site]:
        """What each layer's MLP is handed."""
        found: set[Site] = set()
        for layer in range(self.lm.n_layers):
            with suppress(ModelError):
                found.add(self.lm.hook(f"blocks.{layer}.mlp_in").read)
        return found

    def _leaf(self, hook: str, leaves: dict[str, Tensor], reads: dict[str, Tensor]) -> Edit:
        """An edit that cuts the gradient at a written place, and lets transcoders' linear skips through."""
        skips = self.skips(hook)

        def edit(x: Tensor) -> Tensor:
            leaf = x.detach().clone().requires_grad_()
            leaves[hook] = leaf
            out = leaf
            for one, index in skips:
                read = torch.cat([reads[r.name] for r in one.reads], dim=-1)
                part = one.parts(skipped(one.coder, read))[index].to(x.dtype) * self.counts[one.name].unsqueeze(-1)
                out = out + (part - part.detach())
            return out

        return edit

    def skips(self, hook: str) -> list[tuple[Transcoder, int]]:
        """The transcoders with a linear skip that write `hook`, and which of their parts goes there."""
        return [
            (one, index)
            for one in self.transcoders
            for index, write in enumerate(one.writes)
            if one.coder.config.skip and write.name == hook
        ]

    def _measured(self) -> int:
        """The bytes that a pass over one copy and its backward pass keep."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in self.lm.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward(1)
        stream = self.length * self.lm.d_model * 4
        gradients = 2 * stream * (len(self.outputs) + 1)
        return sum(size for pointer, size in kept.items() if pointer not in weights) + gradients

    def _outputs(self) -> list[str]:
        """The place where each layer's MLP is cut, in order: where its transcoder writes, else the module's output."""
        by_layer = {split_name(hook.name)[1]: hook.name for one in self.transcoders for hook in one.writes}
        clash = {hook.name for one in self.transcoders for hook in one.writes} - set(by_layer.values())
        if clash:
            raise ModelError(f"coders write both {', '.join(sorted(clash))} and the other side of the same MLP's norm")
        return [by_layer.get(layer) or self._mlp_output(layer).name for layer in range(self.lm.n_layers)]

    def _mlp_output(self, layer: int) -> Hook:
        try:
            return self.lm.hook(f"blocks.{layer}.mlp_out")
        except ModelError:
            return self.lm.hook(f"blocks.{layer}.mlp_out_post")

    @torch.no_grad()
    def _base_pass(self) -> None:
        """Codes, errors, embeddings and the last norm's output of the plain model."""
        wanted = {hook.name for one in self.transcoders for hook in one.reads} | {EMBEDDINGS, LAST, *self.outputs}
        found = self.lm.run(self.tokens.unsqueeze(0), capture=sorted(wanted), logits=False).activations
        held = {name: x[0] for name, x in found.items()}
        self.embeddings: Float[Tensor, "pos d"] = held[EMBEDDINGS]
        self.last: Float[Tensor, "pos d"] = held[LAST]
        self.held = {hook: held[hook] for hook in self.outputs}
        self.errors = {hook: x.float() for hook, x in self.held.items()}
        for one in self.transcoders:
            codes = one.coder.encode(torch.cat([held[hook.name] for hook in one.reads], dim=-1))
            counts = policy_mask(self.tokens.unsqueeze(0), one.coder.config.input_policy)[0]
            self.counts[one.name] = counts
            self.active[one.name] = Active.of(codes, counts)
            for hook, part in zip(one.writes, one.parts(one.coder.decode(codes)), strict=True):
                self.errors[hook.name] = self.errors[hook.name] - part.float() * counts.unsqueeze(-1)
