"""One saved coder gives its whole session back: the model it was trained on, itself, and the text it was trained on.

Text is streamed: documents are read, tokenised and packed into contexts as training packs them, nothing is written.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, DataError, ModelError
from unmix.core.policy import InputPolicy
from unmix.data.config import IDS_COLUMN, DataConfig, Role
from unmix.data.corpora import open_corpus
from unmix.data.ids import as_document, checked_ids, cut_row
from unmix.data.policy import resolve_policy, vocabulary_size
from unmix.data.sources.base import IDS_COLUMNS, Document, MissingColumnError
from unmix.data.tokenise import role_of, token_ids
from unmix.lm import policy_mask

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

log = logging.getLogger("unmix")

CONTEXT = 128
"""Tokens a context where nobody says."""
_DOCUMENTS = 32
"""Documents tokenised at a time."""
_ENDLESS = 10**12
"""Tokens: a stream has no budget, it ends with the text."""
_OWNERS = {
    "pythia": "EleutherAI", "gpt-neo": "EleutherAI", "gpt-j": "EleutherAI", "gemma": "google", "qwen": "Qwen",
    "mistral": "mistralai", "llama": "meta-llama", "meta-llama": "meta-llama", "phi": "microsoft", "opt": "facebook",
    "stablelm": "stabilityai", "bloom": "bigscience", "smollm": "HuggingFaceTB", "olmo": "allenai",
}  # fmt: skip
"""Whose models begin so: TransformerLens' names, which most coders carry, leave the owner out."""


@dataclass(frozen=True)
class Session:
    """A coder with its model and its text. Iterating costs a forward pass a batch, up to the hooks that are read."""

    lm: LanguageModel
    coder: SparseCoder
    data: DataConfig | None
    """Text, context length and input policy; None where nobody says which text."""
    column_said: bool = True
    """False where a data set is named, but not which column of it was read: a column of ids does for one of text."""

    def contexts(self, role: Role | None = None) -> Iterator[Int[np.ndarray, " context"]]:
        """Packed contexts in the order of the text; with `role`, of the documents alone that a run gave this role."""
        data = self._data() if self.column_said else fitting_column(self._data())
        return stream_contexts(data, self.lm.tokenizer, role)

    def tokens(self, n: int, role: Role | None = None) -> Int[Tensor, "contexts context"]:
        """The first whole contexts that hold `n` tokens, fewer where the text ends. `DataError` where it gives none."""
        data = self._data()
        wanted = max(1, n // data.context)
        return stack(itertools.islice(self.contexts(role), wanted), data)

    def batches(self, size: int = 8, role: Role | None = None) -> Iterator[Int[Tensor, "size context"]]:
        """Batches of `size` contexts until the text ends; the last may be smaller."""
        data, contexts = self._data(), self.contexts(role)
        while rows := list(itertools.islice(contexts, size)):
            yield stack(iter(rows), data)

    def activations(self, size: int = 8, role: Role | None = None) -> Iterator[Float[Tensor, "rows d_in"]]:
        """What the coder reads, float32, `size` contexts at a time; positions that its policy masks are left out."""
        reads = list(self.coder.config.reads)
        policy = self._data().policy
        for tokens in self.batches(size, role):
            documents = packed_documents(tokens, policy)
            found = self.lm.capture(tokens, reads, policy, documents=documents)
            mask = policy_mask(tokens, policy)
            yield torch.cat([found[hook][mask.to(found[hook].device)] for hook in reads], dim=-1).float()

    def _data(self) -> DataConfig:
        if self.data is None:
            raise ConfigError(
                f"{self.coder.name}: nothing here says which text it was trained on; give source= (a file, a folder, "
                "hf:NAME or builtin:python-docs)"
            )
        return self.data


def load_session(
    place: str | Path,
    *,
    format: str | None = None,
    name: str | None = None,
    model: str | LanguageModel | None = None,
    source: str | None = None,
    column: str | None = None,
    tokenised: Literal["rows", "documents"] | None = None,
    hook: str | Sequence[str] | None = None,
    context: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Session:
    """Model, coder and token stream from one saved coder, of any format (`place`, `format`, `name` as for `load`).

    The model, the text and the context length are those that its files name; `model` (a name, a folder or one that is
    loaded), `source`, `column` and `tokenised` (see `DataConfig`), `hook` (several for a crosscoder) and `context` say
    them instead. The text is looked for when it is first read; where nobody says which column of a data set was read
    and it has no text, its token ids are (`input_ids` or `tokens`). `ConfigError` where nobody names the model or the
    hook, `ModelError` where the model cannot be loaded or the coder does not fit it, and what `load` raises.
    """
    from unmix.formats import load
    from unmix.lm.splice import make_bindings

    coder = load(place, format, name)
    if hook is not None:
        coder = at_hooks(coder, (hook,) if isinstance(hook, str) else tuple(hook))
    require_hooks(coder.name, coder.config.reads)
    lm = _model(coder, model, dtype, device)
    coder = coder.to(lm.device)
    make_bindings(lm, {coder.name: coder})
    said = {"source": source, "column": column, "tokenised": tokenised}
    stated = _stated_data(coder.config, {key: value for key, value in said.items() if value is not None})
    column_said = source is not None or "column" in stated or "tokenised" in stated
    return Session(lm, coder, _session_data(coder.config, lm, stated, context), column_said)


def trained_data(config: CoderConfig) -> dict[str, Any]:
    """Fields of a `DataConfig` that the coder's training facts state: `source`, `context`, `column`, `tokenised`, …"""
    training = config.training
    own = training.get("data")
    if isinstance(own, dict):
        return dict(cast("dict[str, Any]", own))
    e2e = _mapping(_mapping(training.get("e2e_sae")).get("train_data"))
    buffer = _mapping(_mapping(training.get("dictionary_learning")).get("buffer"))
    dataset = training.get("dataset") or e2e.get("dataset_name")
    ids = bool(e2e.get("is_tokenized", bool(e2e)))  # its default
    stated = {
        "source": f"hf:{dataset}" if isinstance(dataset, str) else None,
        "context": training.get("context_size") or e2e.get("n_ctx") or buffer.get("ctx_len"),
        "column": e2e.get("column_name", IDS_COLUMN if ids else None),
        "tokenised": "rows" if ids else None,
        "split": e2e.get("split"),
    }
    return {key: value for key, value in stated.items() if value is not None}


def stream_contexts(
    config: DataConfig, tokenizer: Any, role: Role | None = None
) -> Iterator[Int[np.ndarray, " context"]]:
    """Contexts of exactly `config.context` tokens, packed as `tokenise` packs one role, without end but the text's.

    A text seen before is dropped. Memory: a few documents, and 32 bytes for each one seen. `DataError` where the source
    cannot be used, the tokenizer lacks an id that the policy needs, or a stored id is not in its vocabulary.
    """
    policy = resolve_policy(config.policy, tokenizer)
    if config.tokenised == "rows":
        yield from _cut_rows(config, policy, tokenizer, role)
        return
    lead = [policy.bos_id] if policy.bos == "context" else []
    first = [policy.bos_id] if policy.bos == "document" else []
    payload = config.context - len(lead)
    held = np.empty(0, dtype=np.int64)
    documents = _unseen(config, role)
    while some := list(itertools.islice(documents, _DOCUMENTS)):
        if config.tokenised is None:
            found = token_ids(tokenizer, [document.text for document in some])
        else:
            found = [as_document(checked_ids(document, vocabulary_size(tokenizer)), policy) for document in some]
        rows = [[*first, *ids, policy.separator_id] for ids in found]
        held = np.concatenate([held, *(np.array(row, dtype=np.int64) for row in rows)])
        whole = len(held) // payload
        for row in held[: whole * payload].reshape(whole, payload):
            yield np.concatenate([np.array(lead, dtype=np.int64), row])
        held = held[whole * payload :]


def fitting_column(config: DataConfig) -> DataConfig:
    """`config`, or the token ids of its data set where that has no text; `DataError` where it has neither."""
    try:
        next(open_corpus(config), None)
    except MissingColumnError as error:
        column = next((name for name in IDS_COLUMNS if name in error.found), None)
        if column is None:
            raise
        log.info("%s: its token ids are read, from column %r", config.source, column)
        return config.model_copy(update={"tokenised": "rows", "column": column})
    return config


def stack(contexts: Iterator[np.ndarray], data: DataConfig) -> Int[Tensor, "contexts context"]:
    """Contexts as one tensor; `DataError` where there is none."""
    rows = list(contexts)
    if not rows:
        raise DataError(f"{data.source}: too little text for one context of {data.context} tokens")
    return torch.from_numpy(np.stack(rows))


def packed_documents(tokens: Int[Tensor, "n pos"], policy: InputPolicy) -> Int[Tensor, "n pos"] | None:
    """Ids of packed documents, where the policy keeps them apart; a separator belongs to the document that it ends."""
    if policy.attend_across or policy.separator_id is None:
        return None
    ends = (tokens == policy.separator_id).long()
    if policy.bos == "context" and policy.bos_id == policy.separator_id:
        ends[:, 0] = 0  # one token for both: this one begins a context and ends nothing
    return ends.cumsum(-1) - ends


def fitting_policy(policy: InputPolicy, tokenizer: Any) -> InputPolicy:
    """`policy` with its ids filled in; without BOS where the tokenizer has none and the policy names none."""
    if policy.bos != "none" and policy.bos_id is None and getattr(tokenizer, "bos_token_id", None) is None:
        log.warning("the tokenizer has no begin-of-sequence token: contexts start without one")
        policy = policy.model_copy(update={"bos": "none"})
    return resolve_policy(policy, tokenizer)


def fitting_context(asked: int | None, stated: int | None, lm: LanguageModel) -> int:
    """`asked`, else `stated` or the default cut to what the model takes. `ConfigError` where too much is asked for."""
    limit = lm.max_context
    if asked is not None:
        if not 2 <= asked <= (limit or asked):
            raise ConfigError(f"context is {asked}; {lm.name} takes 2 to {limit or 'any number of'} tokens")
        return asked
    wanted = stated or CONTEXT
    if limit is not None and wanted > limit:
        log.warning("contexts of %d tokens are cut to the %d that %s takes", wanted, limit, lm.name)
        return limit
    return wanted


def at_hooks(coder: SparseCoder, reads: tuple[str, ...], writes: tuple[str, ...] | None = None) -> SparseCoder:
    """The same coder at other hooks; by default it writes what it reads, if it did so before."""
    config = coder.config
    kept = reads if config.writes == config.reads else config.writes
    changed = config.model_copy(update={"reads": reads, "writes": kept if writes is None else writes})
    return SparseCoder.from_state(changed, coder.state_dict(), coder.statistics)


def require_hooks(name: str, reads: tuple[str, ...]) -> None:
    """`ConfigError` where the coder's files did not say what it reads, so that place-holders stand there."""
    if not reads or any(hook == "input" or hook.startswith("input.") for hook in reads):
        raise ConfigError(f"{name}: its files do not say which hook it reads; give it with hook=, or --hook")


def hub_name(name: str) -> str:
    """The hub's name of a model that may carry TransformerLens' short one: `gpt2-small`, `gemma-2-2b`, `pythia-70m`."""
    if "/" in name or ":" in name or Path(name).expanduser().exists():
        return name
    if name == "gpt2-small":
        return "gpt2"
    owners = [owner for prefix, owner in _OWNERS.items() if name.lower().startswith(prefix)]
    return f"{owners[0]}/{name}" if owners else name


def _model(coder: SparseCoder, model: str | LanguageModel | None, dtype: Any, device: Any) -> LanguageModel:
    from unmix.lm.load import load_model

    if model is not None:
        return load_model(model, dtype=dtype, device=device) if isinstance(model, str) else model
    stated = coder.config.model
    if stated is None or not stated.name:
        raise ConfigError(f"{coder.name}: nothing here says which model it was trained on; give model=")
    try:
        return load_model(hub_name(stated.name), dtype=dtype, device=device)
    except ModelError as error:
        raise ModelError(
            f"{coder.name}: was trained on {stated.name}, which does not load; give model= ({error})"
        ) from error


def _stated_data(config: CoderConfig, said: dict[str, Any]) -> dict[str, Any]:
    """What the files say of the text, and what is said instead."""
    stated = trained_data(config)
    if "source" in said or "tokenised" in said:
        # Columns and splits are those of the text that was named in the files.
        gone = ("column", "tokenised") + (("label_column", "split") if "source" in said else ())
        stated = {key: value for key, value in stated.items() if key not in gone}
    return {**stated, **said}


def _session_data(
    config: CoderConfig, lm: LanguageModel, stated: dict[str, Any], context: int | None
) -> DataConfig | None:
    if "source" not in stated:
        return None
    size = stated.get("context")
    tree = {key: value for key, value in stated.items() if key in DataConfig.model_fields}
    tree["context"] = fitting_context(context, size if isinstance(size, int) else None, lm)
    tree["policy"] = fitting_policy(config.input_policy, lm.tokenizer)
    tree["tokens"] = _ENDLESS
    try:
        return DataConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{config.name}: its training facts make no data config: {error}") from error


def _unseen(config: DataConfig, role: Role | None) -> Iterator[Document]:
    """Documents in order, each text once, of one role where it is asked for."""
    seen: set[bytes] = set()
    for document in open_corpus(config):
        digest = document.digest
        if digest not in seen:
            seen.add(digest)
            if role is None or role_of(digest, config) == role:
                yield document


def _cut_rows(
    config: DataConfig, policy: InputPolicy, tokenizer: Any, role: Role | None
) -> Iterator[Int[np.ndarray, " context"]]:
    lead = np.array([policy.bos_id] if policy.bos == "context" else [], dtype=np.int64)
    size = vocabulary_size(tokenizer)
    for document in _unseen(config, role):
        for row in cut_row(checked_ids(document, size), policy, config.context).contexts:
            yield np.concatenate([lead, row])


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}
