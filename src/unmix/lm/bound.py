"""A language model with coders spliced in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm.forward import as_inputs, attach_read, run
from unmix.lm.intervene import Intervention, Span
from unmix.lm.sites import Pass
from unmix.lm.splice import Binding, ErrorMode, SplicedPass, error_mode
from unmix.lm.tokens import policy_mask

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel


@dataclass(frozen=True)
class BoundOutput:
    """One spliced pass. Shapes are [batch, pos, …]."""

    logits: Tensor | None
    """[batch, pos, vocab]; `None` where `logits=False` was asked for."""
    codes: dict[str, Codes]
    """By coder, leading dimensions [batch, pos], after interventions. Masked positions have codes that changed
    nothing."""
    activations: dict[str, Tensor]
    """The hooks asked for by `capture`, as they flowed on."""
    tokens: Tensor | None
    """[batch, pos]."""
    cache: Any = None


class BoundModel:
    """Runs the model with coders in place. Made by `LanguageModel.bind`, good inside its `with` only.

    One object may be called from many threads at once: nothing of a pass is kept here.
    """

    def __init__(
        self,
        lm: LanguageModel,
        bindings: Sequence[Binding],
        error: ErrorMode,
        interventions: Sequence[Intervention] = (),
    ) -> None:
        self.lm = lm
        self.bindings = tuple(bindings)
        self.error: ErrorMode = error_mode(error)
        self.interventions = self._check(interventions)
        self.policy = self._shared_policy()
        self._open = True

    @property
    def sequential(self) -> bool:
        """Whether a coder looks at the tokens before: then no step may show it one token alone."""
        return any(getattr(getattr(b.coder, "encoder", None), "sequential", False) for b in self.bindings)

    def close(self) -> None:
        """End the binding; later calls are errors."""
        self._open = False

    def __call__(
        self,
        inputs: str | Any,
        documents: Any = None,
        *,
        interventions: Sequence[Intervention] = (),
        capture: Sequence[str] = (),
        logits: bool = True,
    ) -> BoundOutput:
        """Run text or token ids [pos] or [batch, pos] through the spliced model.

        `interventions` are added to the binding's own. `documents` [batch, pos] matters where the coders' policy
        keeps packed documents apart. With `logits=False` the pass ends after the last coder or captured hook.
        """
        tokens = as_inputs(self.lm, inputs, self.policy)
        acts = (*self.interventions, *self._check(interventions))
        return self.step(tokens, documents, acts, capture=capture, logits=logits)

    def step(
        self,
        inputs: Any,
        documents: Any,
        acts: Sequence[Intervention],
        *,
        capture: Sequence[str] = (),
        logits: bool = True,
        start: int = 0,
        prompt: int | None = None,
        cache: Any = None,
        generating: bool = False,
    ) -> BoundOutput:
        """One pass over prepared inputs that begin at place `start` of their context (a cache holds the rest)."""
        if not self._open:
            raise ModelError("this binding has ended: call it inside `with lm.bind(...) as bound:`")
        tokens = inputs if self.lm.takes_tokens else None
        batch, length = (1, 0) if tokens is None else (tokens.shape[0], tokens.shape[1])
        span = Span(start, length, length if prompt is None else prompt)
        spliced = [
            SplicedPass(b, self.error, tuple(a for a in acts if a.coder in (None, b.name)), batch, span)
            for b in self.bindings
        ]
        activations: dict[str, Tensor] = {}
        hooks = {spec: self.lm.hook(spec) for spec in capture}

        def prepare(current: Pass) -> None:
            for part in spliced:
                policy = part.binding.coder.config.input_policy
                part.attach(current, None if tokens is None else policy_mask(tokens, policy, start))
            for spec, hook in hooks.items():
                attach_read(current, hook, _keep(activations, spec))

        out, held = run(
            self.lm, inputs, prepare, documents=None if self.policy.attend_across else documents, logits=logits,
            cache=cache, use_cache=generating, last_only=generating,
        )  # fmt: skip
        codes = {part.binding.name: part.codes for part in spliced if part.codes is not None}
        return BoundOutput(out, codes, activations, tokens, held)

    def raw(self, inputs: str | Any, documents: Any = None) -> Tensor:
        """Logits of the bare model on the same inputs: what the splice is compared with."""
        tokens = as_inputs(self.lm, inputs, self.policy)
        out, _ = run(self.lm, tokens, lambda _: None, documents=None if self.policy.attend_across else documents)
        return _tensor(out)

    def generate(self, prompt: str, max_new_tokens: int = 32, **options: Any) -> str:
        """The text that the spliced model writes after `prompt`; options as for `generate_tokens`."""
        tokens = as_inputs(self.lm, prompt, self.policy)
        new = self.generate_tokens(tokens, max_new_tokens, **options)
        return self.lm.decode(new[0])

    def generate_tokens(
        self, tokens: Int[Tensor, "batch pos"], max_new_tokens: int = 32, **options: Any
    ) -> Int[Tensor, "batch new"]:
        """New token ids; see `unmix.lm.generate.generate` for temperature, top_k, seed and interventions."""
        from unmix.lm.generate import generate

        return generate(self, tokens, max_new_tokens, **options)

    def stream(self, prompt: str, max_new_tokens: int = 32, **options: Any) -> Iterator[int]:
        """Generated ids of one text, one at a time."""
        from unmix.lm.generate import stream

        tokens = as_inputs(self.lm, prompt, self.policy)
        for ids in stream(self, tokens, max_new_tokens, **options):
            yield int(ids[0])

    def checked(self, interventions: Sequence[Intervention]) -> tuple[Intervention, ...]:
        """The binding's own interventions and `interventions`, each checked against its coder."""
        return (*self.interventions, *self._check(interventions))

    def _check(self, interventions: Sequence[Intervention]) -> tuple[Intervention, ...]:
        by_name = {binding.name: binding for binding in self.bindings}
        for act in interventions:
            if act.coder is None and len(by_name) > 1:
                raise ModelError(f"{act}: several coders are bound; name one of {', '.join(by_name)} in `coder`")
            if act.coder is not None and act.coder not in by_name:
                raise ModelError(f"{act}: no coder {act.coder!r} is bound; bound: {', '.join(by_name)}")
            binding = by_name[act.coder] if act.coder is not None else self.bindings[0]
            n_latents = binding.coder.config.n_latents
            if act.latent >= n_latents:
                raise ModelError(f"{act}: coder {binding.name!r} has latents 0 to {n_latents - 1}")
        return tuple(interventions)

    def _shared_policy(self) -> InputPolicy:
        """How inputs are fed: the coders must agree on everything but the masked positions."""
        policies = {b.name: b.coder.config.input_policy for b in self.bindings}
        first = next(iter(policies.values()))
        fed = ("bos", "bos_id", "attend_across")
        for name, policy in policies.items():
            different = [part for part in fed if getattr(policy, part) != getattr(first, part)]
            if different:
                part = different[0]
                raise ModelError(
                    f"coders disagree on how text is fed: {self.bindings[0].name!r} has {part} "
                    f"{getattr(first, part)!r}, {name!r} has {getattr(policy, part)!r}"
                )
        return first


def _keep(store: dict[str, Tensor], name: str) -> Any:
    def sink(x: Tensor) -> None:
        store[name] = x

    return sink


def _tensor(value: Tensor | None) -> Tensor:
    if value is None:
        raise ModelError("the model returned no logits")
    return value
