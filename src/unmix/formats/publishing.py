"""Publish a coder on the Hugging Face hub: its files in any writable format, and a model card."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import yaml

from unmix._version import __version__
from unmix.core.errors import FormatError, ServiceError

if TYPE_CHECKING:
    from unmix.coder.coder_set import CoderSet
    from unmix.coder.sparse_coder import SparseCoder

CARD = "README.md"
_REPO = re.compile(r"^[\w.-]+/[\w.-]+$")
_METRICS = ("l0", "fvu", "explained_variance", "mse", "cosine", "dead", "ce_recovered", "ce_loss", "kl", "tokens")
"""Figures of an evaluation that a card shows, in this order."""


def push_to_hub(
    coder: SparseCoder | CoderSet,
    repo_id: str,
    *,
    path_in_repo: str = "",
    format: str = "native",
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    model_card: bool = True,
    figures: Mapping[str, float] | None = None,
) -> str:
    """Write `coder` in `format` to a repository on the hub, made where there is none; returns the folder's address.

    A `CoderSet` goes up whole, in the native format, and comes back with `unmix.load_all`.

    All files go up in one commit, to `path_in_repo` (the root by default) of the branch `revision`. The card is
    generated and put at the root, unless one is there already or `model_card` is off; `figures` are shown on it as its
    evaluation. The token is the one given, or that of `hf auth login`. Raises `FormatError` (not the name of a
    repository, no write access, a format that cannot say what the coder does), `NonFiniteError`, and `ServiceError`
    where the hub does not answer.
    """
    from huggingface_hub import HfApi

    from unmix.coder.coder_set import CoderSet
    from unmix.formats.loading import convert

    folder = require_place(repo_id, path_in_repo)
    if isinstance(coder, CoderSet) and format != "native":
        raise FormatError(f"{repo_id}: coders whose writes add up are pushed in the native format, not as {format}")
    with TemporaryDirectory(prefix="unmix-push-") as temp:
        files = Path(temp) / "files"
        inside = files / folder
        if isinstance(coder, CoderSet) or format == "native":
            coder.save(inside)
        else:
            convert(coder, inside, format)
        with _plain_errors(repo_id):
            api = HfApi(endpoint=endpoint, token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if model_card and not api.file_exists(repo_id, CARD, revision=revision):
                if isinstance(coder, CoderSet):
                    text = set_card(coder, repo_id, folder, revision, figures)
                else:
                    text = card(coder, repo_id, folder, format, revision, figures)
                (files / CARD).write_text(text, encoding="utf-8")
            what = folder or (f"{len(coder)} coders" if isinstance(coder, CoderSet) else coder.name)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=files,
                revision=revision,
                commit_message=f"{what}: {format} ({__version__})",
            )
            return f"{api.endpoint}/{repo_id}/tree/{revision or 'main'}/{folder}".rstrip("/")


def require_place(repo_id: str, path_in_repo: str = "") -> str:
    """The folder in a repository, without slashes around it. `FormatError` where either name cannot be one."""
    if not _REPO.match(repo_id):
        raise FormatError(f"{repo_id!r}: not the name of a repository; expected owner/name")
    folder = path_in_repo.strip("/")
    if any(part in ("", ".", "..") for part in folder.split("/")) and folder:
        raise FormatError(f"path_in_repo {path_in_repo!r}: expected a folder such as layers.3/wide")
    return folder


def require_access(repo_id: str, token: str | None = None, endpoint: str | None = None) -> str:
    """The name that the hub knows the token by. Nothing is written.

    `FormatError` where there is no token or the hub does not take it, `ServiceError` where it does not answer.
    """
    from huggingface_hub import HfApi

    with _plain_errors(repo_id):
        return str(HfApi(endpoint=endpoint).whoami(token=token)["name"])


def card(
    coder: SparseCoder,
    repo_id: str,
    path: str = "",
    format: str = "native",
    revision: str | None = None,
    figures: Mapping[str, float] | None = None,
) -> str:
    """The text of a model card for `coder`: YAML metadata for the hub, and what a reader wants to know."""
    config = coder.config
    model = config.model.name if config.model else None
    metadata: dict[str, Any] = {"library_name": "unmix"}
    if model and "/" in model and not model.startswith(("/", ".", "~")):
        metadata["base_model"] = model
    metadata["tags"] = ["unmix", "sparse-coder", _kind(coder), config.activation.kind, "interpretability"]
    place = f"hf://{repo_id}{f'@{revision}' if revision else ''}{f'/{path}' if path else ''}"
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    parts = [
        f"---\n{head}\n---",
        f"# {_word(coder.name)}",
        _summary(coder, model),
        "## What it is\n\n" + _rows(_facts(coder, model, format)),
        _loading(coder, place, model),
    ]
    measured = _measured(coder) | {key: _number(value) for key, value in (figures or {}).items()}
    for title, facts in (("How it was trained", _trained(coder)), ("Evaluation", measured)):
        if facts:
            parts.append(f"## {title}\n\n{_rows(facts)}")
    return "\n\n".join(parts) + "\n"


def set_card(
    coders: CoderSet,
    repo_id: str,
    path: str = "",
    revision: str | None = None,
    figures: Mapping[str, float] | None = None,
) -> str:
    """The text of a model card for coders whose writes add up: a row a coder, and how all are loaded."""
    first = next(iter(coders.values()))
    model = first.config.model.name if first.config.model else None
    metadata: dict[str, Any] = {"library_name": "unmix"}
    if model and "/" in model and not model.startswith(("/", ".", "~")):
        metadata["base_model"] = model
    metadata["tags"] = ["unmix", "sparse-coder", "cross-layer-transcoder", first.config.activation.kind]
    place = f"hf://{repo_id}{f'@{revision}' if revision else ''}{f'/{path}' if path else ''}"
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    rows = [
        f"| {_word(name)} | {_codes(coder.config.reads)} | {_codes(coder.config.writes)} "
        f"| {coder.config.n_latents:,} | {coder.config.activation.kind} |"
        for name, coder in coders.items()
    ]
    where = f" of `{_word(model)}`" if model else ""
    parts = [
        f"---\n{head}\n---",
        f"# {_word(path or repo_id.partition('/')[2])}",
        f"{len(coders)} coders{where} that were trained as one: what they write to a hook adds up.",
        "\n".join(["| coder | reads | writes | latents | activation |", "|---|---|---|---|---|", *rows]),
        f'## Loading it\n\n```python\nimport unmix\n\ncoders = unmix.load_all("{place}")  # a CoderSet\n```',
    ]
    shown = {"How it was trained": _trained(first), "Evaluation": {k: _number(v) for k, v in (figures or {}).items()}}
    parts += [f"## {title}\n\n{_rows(facts)}" for title, facts in shown.items() if facts]
    return "\n\n".join(parts) + "\n"


def _kind(coder: SparseCoder) -> str:
    config = coder.config
    if len(config.reads) > 1:
        return "crosscoder"
    return "sparse-autoencoder" if config.reads == config.writes else "transcoder"


def _summary(coder: SparseCoder, model: str | None) -> str:
    config = coder.config
    kind = _kind(coder).replace("-", " ")
    article = "A" if kind[0] not in "aeiou" else "An"
    where = f" of `{_word(model)}`" if model else ""
    reads, writes = _codes(config.reads), _codes(config.writes)
    hooks = f"reads {reads}" if config.reads == config.writes else f"reads {reads} and writes {writes}"
    return f"{article} {kind}{where} with {config.n_latents:,} latents: it {hooks}."


def _facts(coder: SparseCoder, model: str | None, format: str) -> dict[str, str]:
    config = coder.config
    activation = config.activation.model_dump(mode="json")
    kind = activation.pop("kind")
    settings = ", ".join(f"{key} {value}" for key, value in activation.items() if value not in (None, False))
    return {
        "Model": f"`{_word(model)}`" if model else "not recorded",
        "Reads": _codes(config.reads),
        "Writes": _codes(config.writes),
        "Latents": f"{config.n_latents:,}",
        "Width": f"{config.d_in:,} in, {config.width_out:,} out",
        "Activation": f"{kind}{f' ({settings})' if settings else ''}",
        "Input normalisation": config.normalise.kind,
        "Pre-bias": config.pre_bias,
        "Gate acts on": config.gate_space,
        "Skip connection": "yes" if config.skip else "no",
        "Tokens it is for": f"BOS: {config.input_policy.bos}; first {config.input_policy.skip_first} positions masked",
        "Parameters": f"{sum(p.numel() for p in coder.parameters()):,}",
        "Files": format,
        "Hash": f"`{coder.hash()}`",
    }


def _loading(coder: SparseCoder, place: str, model: str | None) -> str:
    bound = (
        f'\nlm = unmix.load_model("{_word(model)}")\nwith lm.bind(coder) as bound:\n    out = bound("…")'
        if model
        else ""
    )
    return (
        "## Loading it\n\n```python\nimport unmix\n\n"
        f'coder = unmix.load("{place}")\ncodes = coder.encode(x)  # x [..., {coder.config.d_in}]\n'
        f"x_hat = coder.decode(codes)  # [..., {coder.config.width_out}]{bound}\n```"
    )


def _trained(coder: SparseCoder) -> dict[str, str]:
    """What the config says about the training, one level deep; the settings of other libraries are named, not shown."""
    facts: dict[str, str] = {}
    for key, value in coder.config.training.items():
        if key in ("source", "published", "evaluation"):
            continue
        if isinstance(value, Mapping):
            tree = cast("Mapping[str, Any]", value)
            plain = {k: v for k, v in tree.items() if isinstance(v, (str, int, float, bool)) and not _is_path(v)}
            facts[key.replace("_", " ")] = ", ".join(f"{k} {_number(v)}" for k, v in list(plain.items())[:12])
        elif isinstance(value, (str, int, float, bool)) and not _is_path(value):
            facts[key.replace("_", " ")] = _number(value)
    source = coder.config.training.get("source")
    if isinstance(source, Mapping):
        tree = cast("Mapping[str, Any]", source)
        origin = tree.get("source") or tree.get("repo") or tree.get("url")
        if origin:
            facts["converted from"] = f"{origin} ({tree.get('format', 'unknown layout')})"
    return {key: value for key, value in facts.items() if value}


def _measured(coder: SparseCoder) -> dict[str, str]:
    """Figures under `training["evaluation"]` or `training["published"]`."""
    facts: dict[str, str] = {}
    for place in ("published", "evaluation"):
        tree = coder.config.training.get(place)
        if isinstance(tree, Mapping):
            numbers = cast("Mapping[str, Any]", tree)
            facts |= {key: _number(numbers[key]) for key in _METRICS if isinstance(numbers.get(key), (int, float))}
    return facts


def _is_path(value: object) -> bool:
    """Whether a text names a place on somebody's machine, which is nobody else's business."""
    return isinstance(value, str) and (value.startswith(("/", "~", "file:")) or "\\" in value)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _word(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _rows(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())])


def _codes(hooks: tuple[str, ...]) -> str:
    return ", ".join(f"`{_word(hook)}`" for hook in hooks)


def _word(text: str | None) -> str:
    """A text that cannot break out of a table's cell or of code."""
    return re.sub(r"[`|\r\n<>]", " ", text or "").strip()


@contextmanager
def _plain_errors(repo: str) -> Generator[None]:
    """The hub's refusals in words. A token is never part of a message."""
    from huggingface_hub import errors

    # The hub's client re-exports its HTTP library's base error from here.
    network = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise FormatError(
                f"{repo}: the hub refuses to write there ({status}); does the token allow it? (hf auth login)"
            ) from error
        if status < 500 and status != 429:
            raise FormatError(f"{repo}: the hub refuses ({_first(error)})") from error
        raise ServiceError(f"{repo}: the hub does not answer ({_first(error)})") from error
    except errors.LocalTokenNotFoundError as error:
        raise FormatError(f"{repo}: writing needs a token: hf auth login, or token=…") from error
    except (network, OSError, RuntimeError) as error:  # RuntimeError: the client's word for a large file that failed
        raise ServiceError(f"{repo}: the hub does not answer ({type(error).__name__}: {_first(error)})") from error


def _first(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
