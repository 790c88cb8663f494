"""A language model with coders spliced in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, overload

from jaxtyping import Bool, Int
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm.binding import Binding, check_order
from unmix.lm.forward import as_inputs, attach_read, run
from unmix.lm.interventions.acts import Intervention
from unmix.lm.interventions.distribution import Distribution
from unmix.lm.interventions.places import Range, Span, checked_range, columns_where
from unmix.lm.padding import checked_mask, padding_keywords
from unmix.lm.plan import Plan, Planner
from unmix.lm.sites import Pass
from unmix.lm.splice import ErrorMode, SplicedPass, answering, attach_together, error_mode
from unmix.lm.tokens import default_policy, policy_mask

if TYPE_CHECKING:
    from unmix.lm.interventions.target_kl import TargetKL
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
        where: Range = "all",
        distributions: Mapping[str, Distribution] | None = None,
        policy: InputPolicy | None = None,
    ) -> None:
        self.lm = lm
        self.bindings = tuple(bindings)
        self.error: ErrorMode = error_mode(error)
        self.where: Range = checked_range(where)
        if self.where != "all" and not lm.takes_tokens:
            raise ModelError(f"{lm.name} takes no tokens: where={where!r} means nothing there")
        check_order(lm, self.bindings)
        self._planner = Planner(lm, self.bindings, distributions or {})
        self.interventions = tuple(interventions)
        self.plan(())
        self._given = policy
        self.policy = self._shared_policy() if policy is None else policy
        self._open = True

    @property
    def sequential(self) -> bool:
        """Whether a coder looks at the tokens before: then no step may show it one token alone."""
        return any(getattr(getattr(b.coder, "encoder", None), "sequential", False) for b in self.bindings)

    def close(self) -> None:
        """End the binding; later calls are errors."""
        self._open = False

    def plan(self, interventions: Sequence[Intervention]) -> Plan:
        """The binding's own interventions, then `interventions`, checked against what is bound."""
        return self._planner.plan((*self.interventions, *interventions))

    def __call__(
        self,
        inputs: str | Any,
        documents: Any = None,
        *,
        interventions: Sequence[Intervention] = (),
        capture: Sequence[str] = (),
        logits: bool = True,
        attention_mask: Any = None,
        prompt: int | None = None,
    ) -> BoundOutput:
        """Run text or token ids [pos] or [batch, pos] through the spliced model.

        `interventions` come after the binding's own. `documents` [batch, pos] matters where the coders' policy keeps
        packed documents apart. `attention_mask` [batch, pos] is 0 on padding, left or right. The first `prompt` columns
        (default: all) are the prompt of `where="prompt"`. With `logits=False` the pass ends after the last coder or
        captured hook.
        """
        tokens = as_inputs(self.lm, inputs, self.policy)
        mask = checked_mask(self.lm, tokens, attention_mask)
        return self.step(
            tokens, documents, self.plan(interventions), capture=capture, logits=logits, prompt=prompt, padding=mask
        )  # fmt: skip

    def step(
        self,
        inputs: Any,
        documents: Any,
        plan: Plan,
        *,
        capture: Sequence[str] = (),
        logits: bool = True,
        start: int = 0,
        prompt: int | None = None,
        cache: Any = None,
        generating: bool = False,
        padding: Bool[Tensor, "batch all"] | None = None,
    ) -> BoundOutput:
        """One pass over prepared inputs that begin at column `start` of their context (a cache holds the rest).

        `padding` is True where a token is real, over all columns so far.
        """
        if not self._open:
            raise ModelError("this binding has ended: call it inside `with lm.bind(...) as bound:`")
        if padding is not None and self.sequential:
            raise ModelError("a coder that looks at earlier tokens cannot be given padded texts; run them one by one")
        tokens = inputs if self.lm.takes_tokens else None
        batch, length = (1, 0) if tokens is None else (tokens.shape[0], tokens.shape[1])
        span = _span(start, length, length if prompt is None else prompt, padding)
        spliced = [
            SplicedPass(b, self.error, plan.changes[b.name], batch, span) for b in self.bindings
        ] if tokens is None or span.touches(self.where) else []  # fmt: skip
        activations: dict[str, Tensor] = {}
        hooks = {spec: self.lm.hook(spec) for spec in capture}

        def prepare(current: Pass) -> None:
            masks = self._attach(current, spliced, tokens, span)
            for push in plan.pushes:
                push.attach(current, batch, span, answering(spliced), masks)
            for spec, hook in hooks.items():
                attach_read(current, hook, _keep(activations, spec))

        apart = documents if not self.policy.attend_across else None
        if apart is not None and padding is not None:
            raise ModelError("packed documents and padding do not go together: give one of the two")
        out, held = run(
            self.lm, inputs, prepare, documents=apart, logits=logits, cache=cache, use_cache=generating,
            last_only=generating, extra=padding_keywords(self.lm, padding, start),
        )  # fmt: skip
        codes = {part.binding.name: part.codes for part in spliced if part.codes is not None}
        return BoundOutput(out, codes, activations, tokens, held)

    def _attach(
        self, current: Pass, spliced: Sequence[SplicedPass], tokens: Tensor | None, span: Span
    ) -> dict[str, Tensor | None]:
        """Coders in place, those of a set as one; the positions that each touches."""
        masks: dict[str, Tensor | None] = {}
        fired = answering(spliced)
        alone = enumerate(spliced)
        for _, members in groupby(alone, lambda item: item[1].binding.together or item[0]):
            parts = [part for _, part in members]
            mask = None if tokens is None else self._mask(tokens, self.policy_of(parts[0].binding), span)
            for part in parts:
                part.fired = fired
                masks[part.binding.name] = mask
            attach_together(current, parts, mask)
        return masks

    def policy_of(self, binding: Binding) -> InputPolicy:
        """What says which positions a coder leaves alone: the policy given to `bind`, else the coder's own."""
        own: InputPolicy = binding.coder.config.input_policy
        return own if self._given is None else self._given

    def _mask(self, tokens: Tensor, policy: InputPolicy, span: Span) -> Bool[Tensor, "batch pos"]:
        mask = policy_mask(tokens, policy, span.start)
        if span.pads is not None:
            # With padding the first positions of a text are not those of its row.
            mask = policy_mask(tokens, policy.model_copy(update={"skip_first": 0}))
            mask = mask & (span.places(len(tokens), tokens.device) >= policy.skip_first)
        if self.where == "all" and span.valid is None:
            return mask
        return mask & columns_where(self.where, len(tokens), span, tokens.device)

    def raw(self, inputs: str | Any, documents: Any = None, *, attention_mask: Any = None) -> Tensor:
        """Logits of the bare model on the same inputs: what the splice is compared with."""
        tokens = as_inputs(self.lm, inputs, self.policy)
        mask = checked_mask(self.lm, tokens, attention_mask)
        apart = None if self.policy.attend_across else documents
        out, _ = run(self.lm, tokens, lambda _: None, documents=apart, extra=padding_keywords(self.lm, mask, 0))
        return _tensor(out)

    @overload
    def generate(self, prompt: str, max_new_tokens: int = 32, **options: Any) -> str: ...

    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], max_new_tokens: int = 32, **options: Any) -> list[str]: ...

    def generate(
        self, prompt: str | list[str] | tuple[str, ...], max_new_tokens: int = 32, **options: Any
    ) -> str | list[str]:
        """The text that the spliced model writes after `prompt`, without the stop token; of several, a list.

        Several prompts run as one batch, padded on the left. Options: those of `unmix.lm.generate.generate`.
        """
        from unmix.lm.generate import generate_texts

        texts = generate_texts(self, [prompt] if isinstance(prompt, str) else list(prompt), max_new_tokens, **options)
        return texts[0] if isinstance(prompt, str) else texts

    def generate_tokens(
        self, tokens: Int[Tensor, "batch pos"], max_new_tokens: int = 32, **options: Any
    ) -> Int[Tensor, "batch new"]:
        """New token ids; see `unmix.lm.generate.generate` for sampling, seeds, interventions and padding."""
        from unmix.lm.generate import generate

        return generate(self, tokens, max_new_tokens, **options)

    def stream(self, prompt: str, max_new_tokens: int = 32, **options: Any) -> Iterator[int]:
        """Generated ids of one text, one at a time."""
        from unmix.lm.generate import stream

        tokens = as_inputs(self.lm, prompt, self.policy)
        return (int(ids[0]) for ids in stream(self, tokens, max_new_tokens, **options))

    def stream_text(self, prompt: str, max_new_tokens: int = 32, **options: Any) -> Iterator[str]:
        """Generated text, piece by piece as it is written; together the pieces are what `generate` gives."""
        from unmix.lm.generate import stream_text

        return stream_text(self, prompt, max_new_tokens, **options)

    def steer_to_kl(
        self, inputs: str | Any, interventions: Sequence[Intervention], target: float, **options: Any
    ) -> TargetKL:
        """The strength of `interventions` at which they move the next-token distribution by `target` nats on average.

        See `unmix.lm.interventions.target_kl.steer_to_kl` for what is measured, how it is found, and the options.
        """
        from unmix.lm.interventions.target_kl import steer_to_kl

        return steer_to_kl(self, inputs, interventions, target, **options)

    def _shared_policy(self) -> InputPolicy:
        """How inputs are fed: the coders must agree on everything but the masked positions."""
        policies = {b.name: b.coder.config.input_policy for b in self.bindings}
        if not policies:
            return default_policy(self.lm.tokenizer) if self.lm.has_tokenizer else InputPolicy(bos="none")
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


def _span(start: int, length: int, prompt: int, padding: Tensor | None) -> Span:
    if padding is None:
        return Span(start, length, prompt)
    pads = padding.long().argmax(dim=1)
    return Span(start, length, prompt, pads, padding[:, start : start + length])


def _keep(store: dict[str, Tensor], name: str) -> Any:
    def sink(x: Tensor) -> None:
        store[name] = x

    return sink


def _tensor(value: Tensor | None) -> Tensor:
    if value is None:
        raise ModelError("the model returned no logits")
    return value
