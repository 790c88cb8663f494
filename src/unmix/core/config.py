"""Configs: frozen pydantic models, read from YAML, changed by dotted overrides, hashed by meaning.

A field is *semantic* (it changes results; it enters the hash of its stage) or *operational*
(worker counts, paths of caches, progress; mark it with `operational(...)`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from unmix.core.errors import ConfigError, did_you_mean

CONFIG_SCHEMA = 1


class Config(BaseModel):
    """Base of every config: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=BaseModel)


def operational(default: Any = ..., **kwargs: Any) -> Any:
    """A field that does not change results and so stays out of hashes."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


_COUNT = re.compile(r"^\s*([0-9][0-9_,]*(?:\.[0-9]*)?(?:[eE][0-9]{1,2})?)\s*([kKmMbBgG]?)\s*$")
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parse_count(value: Any) -> Any:
    """`"10M"` → 10_000_000, `"450k"` → 450_000, `1e6` → 1_000_000; other values pass through."""
    if isinstance(value, str) and (match := _COUNT.match(value)):
        # Exact: in floating point "4.1B" would be 4,099,999,999.9999995.
        number = Fraction(match[1].replace("_", "").replace(",", "")) * _SCALE[match[2].lower()]
        return int(number) if number.denominator == 1 else float(number)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that may be written 10M, 450k or 1e6."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top is a mapping; `ConfigError` otherwise."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top must be a mapping of fields, found {type(tree).__name__}")
    for key in cast("dict[Any, Any]", tree):
        if not isinstance(key, str):
            raise ConfigError(f"{path}: a field's name must be a word, found {key!r}")
    return cast("dict[str, Any]", tree)


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`["--coder.k", "64", "--train.lr=1e-3"]` → `{"coder.k": "64", "train.lr": "1e-3"}`."""
    pairs: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}; overrides look like --coder.k 64")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            value = rest.pop(0)
        first, *names = key.split(".")
        # Fields may be written with dashes; what stands between may be a name that has some.
        last = [names.pop().replace("-", "_")] if names else []
        pairs[".".join([first.replace("-", "_"), *names, *last])] = value
    return pairs


def apply_overrides(tree: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `tree` with each dotted key set; values are read as YAML scalars (`64`, `true`, `[1, 2]`)."""
    result = cast("dict[str, Any]", json.loads(json.dumps(tree, default=str)))
    for dotted, text in overrides.items():
        *parents, last = dotted.split(".")
        node = result
        for depth, part in enumerate(parents):
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--{dotted}: {'.'.join(parents[: depth + 1])} is not a group of fields")
            node = cast("dict[str, Any]", child)
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{dotted}: cannot read the value {text!r}") from error
    return result


def build(cls: type[C], tree: Mapping[str, Any], source: str = "config") -> C:
    """Validate `tree` as `cls`; every problem in one `ConfigError` with places and nearest names."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(cls, cast("dict[str, Any]", problem)) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _describe(cls: type[BaseModel], problem: dict[str, Any]) -> str:
    where = [str(part) for part in problem["loc"]]
    dotted = ".".join(where) or "(top)"
    if problem["type"] == "extra_forbidden":
        owner = _model_at(cls, where[:-1])
        return f"unknown field {dotted!r}. {did_you_mean(where[-1], owner.model_fields)}"
    if problem["type"] == "missing":
        return f"{dotted}: missing"
    if problem["type"] == "union_tag_not_found":
        return f"{dotted}.kind: missing"
    if problem["type"] == "union_tag_invalid":
        tag, allowed = str(problem["ctx"]["tag"]), re.findall(r"'([^']*)'", str(problem["ctx"]["expected_tags"]))
        return f"{dotted}: unknown kind {tag!r}. {did_you_mean(tag, allowed)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem.get("input"), dict):
        # A check over several fields says itself what it found.
        return f"{dotted}: {message}" if where else message
    shown = json.dumps(problem.get("input"), default=str)
    return f"{dotted}: {message} (found {shown[:120]})"


def _model_at(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The config class found by walking field names from `cls`, through optionals, unions, lists and dicts.

    Behind a tagged union stands the tag (`activation.topk.k`): it picks the member whose `kind` it is.
    """
    members: list[type[BaseModel]] = []
    for part in path:
        field = cls.model_fields.get(part)
        if field is not None:
            members = _models_in(field.annotation) or members
            cls = members[0] if members else cls
        else:
            cls = next((m for m in members if "kind" in m.model_fields and m.model_fields["kind"].default == part), cls)
    return cls


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def load_config(cls: type[C], path: str | Path | None, overrides: Mapping[str, str] | None = None) -> C:
    """Read a YAML file (or start empty), apply overrides, validate whole. Nothing else has been touched yet."""
    tree = {} if path is None else read_yaml(path)
    tree = apply_overrides(tree, overrides or {})
    return build(cls, tree, source=str(path) if path is not None else "arguments")


def semantic_dict(config: BaseModel) -> dict[str, Any]:
    """The fields of `config` that change results, as plain JSON values."""
    result: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        result[name] = _plain(getattr(config, name))
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return semantic_dict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in cast("Sequence[Any]", value)]
    if isinstance(value, Path):
        return str(value)
    return value


def semantic_hash(*parts: Any) -> str:
    """SHA-256 (16 hex digits) over canonical JSON of configs, strings, numbers and upstream hashes."""
    plain = [CONFIG_SCHEMA, *[_plain(part) for part in parts]]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
