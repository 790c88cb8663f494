"""LanguageModel: a loaded model with its hooks, capture, logits and the splice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy, ModelFingerprint
from unmix.lm import tokens as text
from unmix.lm.binding import Bindable, gather, make_bindings
from unmix.lm.bound import BoundModel
from unmix.lm.capture import capture, measure_width
from unmix.lm.fingerprint import fingerprint
from unmix.lm.forward import Edit, RunOutput, as_inputs, attach_read, attach_write, forward_parameters, run
from unmix.lm.hooks import HookNames
from unmix.lm.interventions.acts import Intervention
from unmix.lm.interventions.distribution import named_distributions
from unmix.lm.interventions.places import Range
from unmix.lm.lens import LensPoints, find_lens, lens_fingerprint, lens_logits
from unmix.lm.packing import Method, find_method
from unmix.lm.padding import past_padding
from unmix.lm.points import Hook, Points, PointTable, find_arch
from unmix.lm.sites import Pass
from unmix.lm.splice import ErrorMode


class LanguageModel:
    """A language model of Hugging Face or TransformerLens, or any `nn.Module`, with names for the places inside it.

    Any other module has module-path hooks only, takes whatever its `forward` takes, and has `d_model`, `n_layers` and
    `vocab_size` 0.
    """

    def __init__(self, model: nn.Module, name: str, tokenizer: Any = None) -> None:
        self.model = model
        self.name = name
        self._tokenizer = tokenizer
        self._arch = find_arch(model)
        self._lens = find_lens(model) if self._arch is None else None
        self._points: PointTable | None = None
        if self._arch is not None:
            self._points = Points(model, self._arch)
        elif self._lens is not None:
            self._points = LensPoints(self._lens)
        self.names = HookNames(model, self._points)
        self.forward_parameters = forward_parameters(model)
        self._widths: dict[str, int] = {}

    def __repr__(self) -> str:
        """One line: name, sizes, dtype, device."""
        return (
            f"LanguageModel({self.name!r}, {self.n_layers} layers, d_model {self.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def is_transformers(self) -> bool:
        """Whether this is a Hugging Face language model whose parts have known roles."""
        return self._arch is not None

    @property
    def takes_tokens(self) -> bool:
        """Whether inputs are token ids (else whatever the module's own `forward` takes)."""
        return self._points is not None or self._tokenizer is not None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; `ModelError` where the model came without one."""
        if self._tokenizer is None:
            raise ModelError(f"{self.name} came without a tokenizer: give token ids, or load_model(..., tokenizer=)")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be encoded."""
        return self._tokenizer is not None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        if self._lens is not None:
            return int(self._lens.cfg.d_model)
        return 0 if self._arch is None else self._arch.d_model

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return 0 if self._points is None else self._points.n_layers

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the embedding; can exceed the tokenizer's length by padding rows."""
        if self._lens is not None:
            return int(self._lens.cfg.d_vocab)
        if self._arch is None:
            return 0 if self._tokenizer is None else len(self._tokenizer)
        weight = getattr(self._arch.embed, "weight", None)
        return int(weight.shape[0]) if isinstance(weight, Tensor) else self._arch.vocab_size

    @property
    def max_context(self) -> int | None:
        """Longest context in tokens that the model says it takes; `None` where it says nothing."""
        config: Any = getattr(self.model, "cfg" if self._lens is not None else "config", None)
        found = getattr(config, "max_position_embeddings", getattr(config, "n_ctx", None))
        return int(found) if isinstance(found, int) and found > 0 else None

    @property
    def sliding_window(self) -> int | None:
        """How far back some or all layers attend, in tokens; `None` where all attend to everything."""
        return None if self._arch is None else self._arch.quirks.sliding_window

    @cached_property
    def packing(self) -> Method:
        """How packed documents are kept apart in this model; found out on first use."""
        return find_method(self) if self._arch is not None else "none"

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text."""
        config: Any = getattr(self.model, "generation_config", None)
        found = getattr(config, "eos_token_id", None)
        if found is None and self._tokenizer is not None:
            found = self._tokenizer.eos_token_id
        if found is None:
            return ()
        return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Name, family, sizes and a hash of the weights, but for TransformerLens', which may have been folded."""
        if self._lens is not None:
            return lens_fingerprint(self._lens, self.name)
        return fingerprint(self.model, self.name, self.n_layers, self.d_model, self.vocab_size)

    # hooks -----------------------------------------------------------------------------------------------------

    def hook(self, spec: str) -> Hook:
        """The place that `spec` names (canonical or alias); `ModelError` with the nearest real names."""
        return self.names.resolve(spec)

    def hooks(self) -> list[str]:
        """Canonical names of every place, in the order of the forward pass."""
        return self.names.names()

    def width(self, hook: str) -> int:
        """Size of the last dimension at a hook; found by running one token that far, once."""
        found = self.hook(hook)
        if found.name not in self._widths:
            self._widths[found.name] = measure_width(self, found)
        return self._widths[found.name]

    @property
    def last_hook(self) -> str:
        """The stream after the last block: what `unembed` takes."""
        if self._points is None:
            raise ModelError(f"{self.name} has no blocks")
        return f"blocks.{self.n_layers - 1}.resid_post"

    # text ------------------------------------------------------------------------------------------------------

    def encode_text(self, string: str, policy: InputPolicy | None = None) -> Int[Tensor, " pos"]:
        """Token ids of a text; special tokens come from `policy` alone (default: a BOS where there is one)."""
        return text.encode_text(self.tokenizer, string, policy or text.default_policy(self.tokenizer))

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of token ids, special tokens included, spaces as they are."""
        listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return str(self.tokenizer.decode(listed, clean_up_tokenization_spaces=False))

    def token_strings(self, ids: Tensor | Iterable[int]) -> list[str]:
        """One display string per id: exact spaces and newlines, partial characters as `\\xe2`."""
        return self._strings(ids.reshape(-1).tolist() if isinstance(ids, Tensor) else ids)

    @cached_property
    def _strings(self) -> text.TokenStrings:
        return text.TokenStrings(self.tokenizer)

    # passes ----------------------------------------------------------------------------------------------------

    def capture(
        self,
        inputs: Any,
        hooks: str | Sequence[str],
        policy: InputPolicy | None = None,
        positions: Tensor | Sequence[int] | None = None,
        documents: Any = None,
        attention_mask: Any = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> dict[str, Tensor]:
        """Activations at several hooks in one pass: {name as given: [batch, pos, d]}, without gradients.

        The pass ends at the last hook needed and keeps nothing else. `inputs`: a text (encoded under `policy`) or
        token ids [pos] or [batch, pos]. `positions`: places [n] → [batch, n, d], or a bool mask [batch, pos] →
        [kept, d]. `documents` [batch, pos]: ids of packed documents; where `policy` is absent or keeps them apart
        (`attend_across: false`), tokens attend only inside their own and positions restart in each.
        `attention_mask` [batch, pos] is 0 on padding, left or right; what stands there means nothing.
        Values are in the model's dtype and on its device unless `dtype` or `device` say otherwise. Raises `ModelError`:
        unknown hooks or inputs that do not fit.
        """
        return capture(self, inputs, hooks, policy, positions, documents, attention_mask, dtype, device)

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "batch pos"], documents: Any = None) -> Float[Tensor, "batch pos vocab"]:
        """Logits of the bare model, without gradients; documents, where given, are kept apart."""
        found = self.run(tokens, documents=documents).logits
        if found is None:
            raise ModelError(f"{self.name} returned no logits")
        return found

    def run(
        self,
        inputs: Any,
        edits: Mapping[str, Edit] | None = None,
        capture: Sequence[str] = (),
        documents: Any = None,
        *,
        logits: bool = True,
        skip: Mapping[str, Tensor] | None = None,
        attention_mask: Any = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> RunOutput:
        """One pass with activations replaced: the low-level splice. Gradients follow the caller's grad mode.

        `edits` maps a hook to a function from its activation [batch, pos, d] to a replacement of that shape (any
        dtype). A hook in `capture` gives the activation as it flows on, after edits. With `logits=False` the pass
        ends after the last hook; `run(..., capture=[lm.last_hook], logits=False)` with `unembed` on slices avoids
        holding [batch, pos, vocab] whole. `skip`: what `unmix.lm.start` gives for a pass that starts in the middle.
        `use_cache` gives keys and values in `.cache`; handed on as `cache`, the next pass takes only the tokens after
        them. `attention_mask` [batch, pos so far] is 0 on padding, left or right.
        """
        if use_cache and not logits:
            raise ModelError("a pass that ends early leaves no whole cache: use_cache needs logits=True")
        edited: dict[Hook, Edit] = {}
        for spec, edit in (edits or {}).items():
            if (hook := self.hook(spec)) in edited:
                raise ModelError(f"{spec}: two edits of {hook.name}")
            edited[hook] = edit
        wanted = {spec: self.hook(spec) for spec in capture}
        activations: dict[str, Tensor] = {}

        def prepare(current: Pass) -> None:
            for hook, edit in edited.items():
                attach_write(current, hook, edit)
            for spec, hook in wanted.items():
                attach_read(current, hook, lambda x, spec=spec: activations.__setitem__(spec, x))

        prepared = as_inputs(self, inputs)
        extra = past_padding(self, prepared, attention_mask, cache)
        found, held = run(
            self, prepared, prepare, documents=documents, logits=logits, skip=skip, cache=cache, use_cache=use_cache,
            extra=extra,
        )  # fmt: skip
        return RunOutput(found, activations, held if use_cache else None)

    def spliced_logits(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[str, Edit], documents: Any = None
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits with each hook's activation replaced by `edits[hook](activation)`; gradients as the caller's."""
        found = self.run(tokens, edits, documents=documents).logits
        if found is None:
            raise ModelError(f"{self.name} returned no logits")
        return found

    def unembed(self, x: Float[Tensor, "*leading d"]) -> Float[Tensor, "*leading vocab"]:
        """Logits of the stream after the last block: final norm, head, and the family's scale and soft cap."""
        if self._lens is not None:
            return lens_logits(self._lens, x.to(self.dtype))
        arch = self._require_arch()
        logits = arch.lm_head(self.before_head(x))
        scale, cap = arch.quirks.logit_multiplier, arch.quirks.final_logit_softcapping
        logits = logits if scale is None else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def before_head(self, x: Float[Tensor, "*leading d"]) -> Float[Tensor, "*leading d_head"]:
        """What the head's product reads for the stream after the last block: the final norm's output."""
        norm = self._points.last_norm if isinstance(self._points, Points) else None
        x = x.to(self.dtype)
        x = x if norm is None else norm(x)
        project: Callable[[Tensor], Tensor] | None = getattr(self._require_arch().trunk, "project_out", None)
        return x if project is None else project(x)

    @property
    def plain_head(self) -> nn.Linear | None:
        """The head, where logits are its product and nothing follows: neither a scale nor a soft cap."""
        arch = self._require_arch()
        follows = (arch.quirks.logit_multiplier, arch.quirks.final_logit_softcapping)
        return arch.lm_head if type(arch.lm_head) is nn.Linear and follows == (None, None) else None

    def ends_in_stream(self, writes: Sequence[str]) -> bool:
        """Whether `unembed` of the stream after the last block gives the logits, where hooks `writes` are replaced."""
        inside = all(name == "embeddings" or name.startswith("blocks.") for name in writes)
        return self._points is not None and inside

    @property
    def points(self) -> Points:
        """Where the model keeps its blocks, norms and projections; `ModelError` where that is not known."""
        self._require_arch()
        assert isinstance(self._points, Points)
        return self._points

    @property
    def unembedding(self) -> Float[Tensor, "vocab d"]:
        """The head's weight."""
        if self._lens is not None:
            return self._lens.W_U.detach().T
        return self._require_arch().lm_head.get_parameter("weight").detach()

    @property
    def unembedding_bias(self) -> Float[Tensor, " vocab"] | None:
        """The head's bias, where it has one."""
        if self._lens is not None:
            return self._lens.b_U.detach()
        bias = getattr(self._require_arch().lm_head, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def logit_scale(self) -> float:
        """What the head's output is multiplied by, before any soft cap."""
        scale = self._require_arch().quirks.logit_multiplier
        return 1.0 if scale is None else float(scale)

    @contextmanager
    def bind(
        self,
        coders: Bindable = (),
        error: ErrorMode = "drop",
        interventions: Sequence[Intervention] = (),
        *,
        where: Range = "all",
        distributions: Any = None,
        policy: InputPolicy | None = None,
    ) -> Generator[BoundModel]:
        """Coders in place of the activations they read and write, for every call of the model this gives.

        `coders`: one, several, {name: coder}, or a `CoderSet`, whose coders write as one; none, where interventions are
        vectors alone. `error="drop"`: reconstructions replace activations. `"keep"`: the error of the reconstruction is
        added back as a constant, so that only interventions change anything. `interventions` hold for every pass
        inside. `where="prompt"` splices at positions of the prompt only ("generated" and given ones likewise); those
        that a coder's policy masks are left alone in any case. `distributions` (a coder's index, what
        `measure_latents` gives, or {name: either}) tells how strongly latents fire, for quantiles and means. `policy`
        takes the place of the coders' own: how text is fed, and which positions pass by untouched.
        Other bindings, nested or in other threads, are not disturbed. Raises `ModelError` before anything runs
        where a coder or an intervention does not fit.
        """
        found = gather(coders)
        if not found.coders and not interventions:
            raise ModelError("there is no coder to bind")
        bindings = make_bindings(self, found.coders, found.together)
        known = named_distributions(distributions, list(found.coders))
        bound = BoundModel(self, bindings, error, interventions, where, known, policy)
        try:
            yield bound
        finally:
            bound.close()

    def _require_arch(self) -> Any:
        if self._arch is None:
            raise ModelError(f"{self.name} is not a Hugging Face language model whose head is known")
        return self._arch
