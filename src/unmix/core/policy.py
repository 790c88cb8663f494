"""How tokens are fed to a language model and which positions count: stored with every coder (decision 9)."""

from __future__ import annotations

from typing import Literal

from unmix.core.config import Config


class InputPolicy(Config):
    """The one statement of BOS, document boundaries and masked positions.

    Capture, training, binding, evaluation, index and viewer all read it from the coder, so that a coder is
    never measured on inputs it was not trained for.
    """

    bos: Literal["context", "document", "none"] = "context"
    """Where a begin-of-sequence token stands: at the start of every context, of every document, or nowhere."""
    bos_id: int | None = None
    """The id used; `None` takes the tokenizer's own (an error where it has none and `bos` is not none)."""
    separator_id: int | None = None
    """Put between packed documents; `None` takes the tokenizer's end-of-text id."""
    attend_across: bool = True
    """Whether a token may attend to the documents packed before its own."""
    skip_first: int = 1
    """Positions at the start of each context that are masked (the first one carries massive activations)."""
    skip_ids: tuple[int, ...] = ()
    """Token ids that are masked wherever they stand."""


class ModelFingerprint(Config):
    """What a coder remembers of the model it was trained on (decision 12). Foreign ones mostly know its name alone."""

    name: str
    family: str | None = None
    n_layers: int | None = None
    d_model: int | None = None
    vocab_size: int | None = None
    weights_hash: str | None = None

    def same_name(self, other: str) -> bool:
        """Whether `other` names the same model: owners, case and TransformerLens' short names put aside."""
        return _plain(self.name) == _plain(other)


def _plain(name: str) -> str:
    """`openai-community/gpt2` and `gpt2-small` are both `gpt2`."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return "gpt2" if last == "gpt2-small" else last
