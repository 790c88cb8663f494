"""The text of `unmix index --model …`: which words describe it, and its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmix.cli._words import Words
from unmix.core.config import parse_count
from unmix.core.errors import ConfigError, did_you_mean
from unmix.data.config import SPEAKERS

if TYPE_CHECKING:
    from unmix.coder.sparse_coder import SparseCoder
    from unmix.core.policy import InputPolicy
    from unmix.data.config import DataConfig
    from unmix.data.shards import TokenShards
    from unmix.lm.model import LanguageModel

DRAWN = ("prompts", "new-tokens", "temperature", "top-k", "top-p")
CHATS = ("speakers", "chat-template", "tools-column")
TEXTS = ("tokens", "context", "column", "label-column", "split", "tokenised", "roles", "seed")
"""Said of text; token shards have all of it behind them."""


def require(asked: Words, name: str) -> str:
    """An option that must be there."""
    if name not in asked.options:
        raise ConfigError(f"--{name} is missing; unmix index --help says what an index is made of")
    return asked.options[name]


def check_text_words(asked: Words, flags: set[str]) -> None:
    """`ConfigError` for options that do not belong together."""
    rolls, shards = "rollouts" in asked.options, _is_tokens(asked)
    if rolls == ("data" in asked.options):
        raise ConfigError("--data and --rollouts: say one of the two" if rolls else "--data is missing (or --rollouts)")
    for name in DRAWN:
        if name in asked.options and not rolls:
            raise ConfigError(f"--{name} belongs to --rollouts")
    for name in CHATS:
        if name in asked.options and not (rolls or "chat" in flags or shards):
            raise ConfigError(f"--{name} belongs to --chat")
    if rolls:
        require(asked, "prompts")
    for name in asked.options.get("speakers", SPEAKERS[0]).split(","):
        if name.strip() not in SPEAKERS:
            raise ConfigError(f"--speakers: no speaker {name.strip()!r}. {did_you_mean(name.strip(), SPEAKERS)}")
    for name in (*TEXTS, "chat-template", "tools-column", *(["chat"] if "chat" in flags else [])) if shards else ():
        if name in asked.options or name in flags:
            raise ConfigError(f"--{name} is said of text, and --data {asked.options['data']} holds tokens")
    for name in ("column", "label-column", "split", "tokenised", "tools-column") if rolls else ():
        if name in asked.options:
            raise ConfigError(f"--{name} is said of --data, and --rollouts takes its place")
    if rolls and "chat" in flags:
        raise ConfigError("--chat is said of --data; roll-outs have speakers anyway")


def _is_tokens(asked: Words) -> bool:
    from unmix.index.sources.tokens import is_tokens

    return "data" in asked.options and is_tokens(asked.options["data"])


def check_source(asked: Words, flags: set[str]) -> None:
    """A wrong path or column is said before anything is loaded."""
    from unmix.data.corpora import find_source
    from unmix.data.sources.base import MissingColumnError

    if "data" not in asked.options or _is_tokens(asked):
        return
    config = _data(asked, flags, {})
    try:
        find_source(config)
    except MissingColumnError:
        if "column" in asked.options or config.tokenised is not None or "chat" in flags:
            raise
        from unmix.train.session import fitting_column

        fitting_column(config)


def _data(asked: Words, flags: set[str], more: dict[str, Any]) -> DataConfig:
    """The data section that the words describe."""
    from unmix.core.config import build
    from unmix.data.config import ChatConfig, DataConfig

    get = asked.options.get
    tree: dict[str, Any] = {
        "source": get("data"), "tokens": get("tokens", "1M"), "label_column": get("label-column"),
        "roles": _roles(get("roles", "explain=0.5,score=0.5")), "seed": asked.whole("seed", 0),
    }  # fmt: skip
    tree |= {key: get(key) for key in ("column", "split", "tokenised") if get(key) is not None}
    if "context" in asked.options:
        tree["context"] = asked.whole("context", 128)
    if "chat" in flags:
        tree["chat"] = {"template": _template(get("chat-template")), "tools_column": get("tools-column")}
    tree |= more
    return build(ChatConfig if "chat" in tree else DataConfig, tree, source="unmix index")


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path}: cannot be read ({error})") from None


def _roles(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, share = part.partition("=")
        number = parse_count(share)
        try:
            found[name.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"--roles {text}: expected shares such as explain=0.5,score=0.5")
    return found


def make_tokens(
    asked: Words, flags: set[str], out: Path, lm: LanguageModel, coder: SparseCoder, policy: InputPolicy
) -> TokenShards:
    """The token shards: those named, or made of the text."""
    from unmix.index.sources.tokens import open_tokens, prepare_tokens, tokens_folder
    from unmix.train.session import fitting_column, fitting_context, trained_data

    if _is_tokens(asked):
        return open_tokens(Path(asked.options["data"]).expanduser(), policy, lm.tokenizer)
    stated = trained_data(coder.config).get("context")
    more: dict[str, Any] = {
        "policy": policy.model_dump(),
        "context": fitting_context(asked.whole("context"), stated if isinstance(stated, int) else None, lm),
    }
    if "rollouts" in asked.options:
        more |= _rollouts(asked, out, lm, policy, "restart" in flags)
    config = _data(asked, flags, more)
    if "chat" not in type(config).model_fields and config.tokenised is None and "column" not in asked.options:
        config = fitting_column(config)
    return prepare_tokens(config, lm.tokenizer, tokens_folder(out), "restart" in flags)


def _rollouts(asked: Words, out: Path, lm: LanguageModel, policy: InputPolicy, restart: bool) -> dict[str, Any]:
    from unmix.lm.rollouts import RolloutConfig, write_rollouts

    config = RolloutConfig(
        prompts=asked.options["prompts"], samples=asked.whole("rollouts", 1), new_tokens=asked.whole("new-tokens", 128),
        temperature=asked.number("temperature", 1.0), top_k=asked.whole("top-k"), top_p=asked.number("top-p"),
        seed=asked.whole("seed", 0), template=_template(asked.options.get("chat-template")), policy=policy,
    )  # fmt: skip
    made = write_rollouts(lm, config, out.parent / f"{out.name}-rollouts", restart)
    return {
        "source": str(made.file), "tokens": asked.whole("tokens", made.tokens), "chat": {"stored": True},
        "column": "ids",
    }  # fmt: skip
