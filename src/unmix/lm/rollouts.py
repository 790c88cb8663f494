"""On-policy text: a model continues prompts; ids are kept as they were drawn, with who said them.

A prompt's continuations hang on nothing but model, prompt and options: they are drawn together, apart from those of
other prompts, with a seed of their own. So neither the order of prompts nor what was done before a stop changes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmix.core.atomic import atomic_file, disk_errors, write_json
from unmix.core.config import semantic_hash
from unmix.core.errors import ConfigError, CorruptError, DataError, ModelError, ResumeError
from unmix.core.lock import folder_lock
from unmix.core.manifest import MANIFEST, require_whole, write_manifest
from unmix.core.policy import InputPolicy
from unmix.core.progress import task
from unmix.core.seeds import derive
from unmix.data.chat import NUMBER, ChatRenderer, Spoken
from unmix.data.chat_rows import chat_document
from unmix.data.config import ChatConfig, ChatSpec
from unmix.data.sources.lines import check_text, data_suffix, read_lines
from unmix.lm.bound import BoundModel
from unmix.lm.generate import generate
from unmix.lm.model import LanguageModel
from unmix.lm.sampling import Sampling

KIND = "rollouts"
FILE, HALF, NOTE = "rollouts.jsonl", "rollouts.half.jsonl", "rollouts.json"


@dataclass(frozen=True)
class RolloutConfig:
    """Which prompts are continued, and how."""

    prompts: str
    """A .txt file (one prompt a line, continued as it stands) or .jsonl (`prompt` likewise, or `messages`)."""
    policy: InputPolicy
    """How a plain prompt begins; ids filled in."""
    samples: int = 1
    """Continuations of each prompt."""
    new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    template: str | None = None
    """Of messages; default: the tokenizer's own."""
    thinking: tuple[str, str] = ("<think>", "</think>")

    def __post_init__(self) -> None:
        """`ConfigError` where a number cannot be used."""
        for name in ("samples", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        self.sampling(0)

    def sampling(self, seed: int) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=seed)


@dataclass(frozen=True)
class Rollouts:
    """Finished roll-outs."""

    file: Path
    """One a line: `ids`, `speakers`, `prompt` (its number), `sample`, `text`."""
    rows: int
    tokens: int
    """All ids, those of prompts included, and a separator behind each row."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as ids with speakers, and its hash."""

    spoken: Spoken
    digest: str


def read_prompts(lm: LanguageModel, config: RolloutConfig) -> list[Prompt]:
    """Every prompt, encoded. `DataError` naming a line that is none, `ModelError` for one that leaves no room."""
    path = Path(config.prompts).expanduser()
    check_text(path)
    suffix = data_suffix(path)
    if suffix not in (".txt", ".jsonl"):
        raise DataError(f"--prompts {path}: expected a .txt or .jsonl file, found {suffix or 'no suffix'}")
    reader = _Reader(lm, config, path)
    found = [reader.read(f"{path}:{number}", line, suffix) for number, line in read_lines(path) if line.strip()]
    longest = lm.max_context
    for prompt in found:
        if longest is not None and len(prompt.spoken.ids) + config.new_tokens - 1 > longest:
            raise ModelError(
                f"{path}: a prompt of {len(prompt.spoken.ids)} tokens and {config.new_tokens} new ones: {lm.name} "
                f"takes at most {longest}; say fewer --new-tokens"
            )
    return found


class _Reader:
    def __init__(self, lm: LanguageModel, config: RolloutConfig, path: Path) -> None:
        self._lm, self._config, self._path = lm, config, path
        self._renderer: ChatRenderer | None = None

    def read(self, where: str, line: str, suffix: str) -> Prompt:
        if suffix == ".txt":
            return self._plain(line.rstrip("\r\n"))
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            return self._plain(row["prompt"])
        if isinstance(row, dict) and "messages" in row:
            return self._chat(row, where)
        raise DataError(f"{where}: expected an object with prompt (text) or messages")

    def _plain(self, text: str) -> Prompt:
        ids: list[int] = self._lm.encode_text(text, self._config.policy).tolist()
        begins = self._config.policy.bos != "none"
        speakers = [NUMBER["none"] if begins and not i else NUMBER["user"] for i in range(len(ids))]
        return Prompt(Spoken(ids, speakers), _digest(ids))

    def _chat(self, row: dict[str, Any], where: str) -> Prompt:
        config = ChatConfig(source=str(self._path), chat=ChatSpec(template=self._config.template))
        document = chat_document(row, config, where, where)
        if document is None:
            raise DataError(f"{where}: has no messages")
        if self._renderer is None:
            self._renderer = ChatRenderer(self._lm.tokenizer, config.chat)
        spoken = self._renderer.spoken(json.loads(document.text)["messages"], None, where, prompt=True)
        return Prompt(spoken, _digest(spoken.ids))


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def write_rollouts(lm: LanguageModel, config: RolloutConfig, folder: Path, restart: bool = False) -> Rollouts:
    """Draw every continuation into `folder`; goes on where an earlier call was killed, and finds a finished one.

    `ResumeError` where the folder holds roll-outs of another model, other prompts or options; with `restart` they go.
    """
    prompts = read_prompts(lm, config)
    if not prompts:
        raise DataError(f"--prompts {config.prompts}: no prompts")
    model = lm.fingerprint.model_dump(mode="json", exclude={"name"})
    options = {name: value for name, value in vars(config).items() if name not in ("prompts", "policy", "template")}
    key = semantic_hash(model, str(lm.dtype), lm.device.type, options, [prompt.digest for prompt in prompts])
    with folder_lock(folder):
        _same(folder, key, restart)
        if not (folder / MANIFEST).is_file():
            _draw(lm, config, prompts, folder)
            rows, tokens = _count(folder / HALF)
            (folder / HALF).rename(folder / FILE)
            write_manifest(folder, KIND, [FILE], key=key, rows=rows, tokens=tokens)
    manifest = require_whole(folder, KIND, deep=True)
    return Rollouts(folder / FILE, manifest["rows"], manifest["tokens"])


def _same(folder: Path, key: str, restart: bool) -> None:
    note = folder / NOTE
    found = json.loads(note.read_text(encoding="utf-8"))["key"] if note.is_file() else None
    if found is not None and found != key and not restart:
        raise ResumeError(
            f"{folder}: holds roll-outs of another model, of other prompts or options; say --restart to draw them anew"
        )
    if found != key or restart:
        for name in (MANIFEST, FILE, HALF):
            (folder / name).unlink(missing_ok=True)
    if (folder / FILE).is_file() and not (folder / MANIFEST).is_file():
        (folder / FILE).rename(folder / HALF)
    write_json(note, {"key": key})


def _draw(lm: LanguageModel, config: RolloutConfig, prompts: Sequence[Prompt], folder: Path) -> None:
    half = folder / HALF
    done = _mend(half, config.samples)
    bound = BoundModel(lm, (), "drop", policy=config.policy)
    with task("roll-outs", len(prompts), "prompts", done) as bar, disk_errors(half), half.open("ab") as file:
        for number in range(done, len(prompts)):
            for row in continuations(bound, config, prompts[number], number):
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            bar.advance(1)


def _mend(half: Path, samples: int) -> int:
    """Leave whole prompts alone in a file that a kill cut short; how many they are."""
    if not half.is_file():
        return 0
    lines = half.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    done = len(whole) // samples
    with atomic_file(half) as temp:
        temp.write_bytes(b"".join(whole[: done * samples]))
    return done


def _count(path: Path) -> tuple[int, int]:
    rows = tokens = 0
    with path.open("rb") as file:
        for line in file:
            try:
                tokens += len(json.loads(line)["ids"]) + 1
            except (ValueError, KeyError, TypeError) as error:
                raise CorruptError(f"{path}: line {rows + 1} is no roll-out") from error
            rows += 1
    return rows, tokens


@torch.no_grad()
def continuations(bound: BoundModel, config: RolloutConfig, prompt: Prompt, number: int) -> list[dict[str, Any]]:
    """What the model says after one prompt, `samples` times: rows of the file."""
    lm, ids = bound.lm, prompt.spoken.ids
    seed = derive(config.seed, "rollout", prompt.digest)
    options = vars(config.sampling(seed))
    new = generate(bound, torch.tensor([ids] * config.samples), config.new_tokens, **options).tolist()
    stops = set(lm.stop_ids)
    found: list[dict[str, Any]] = []
    for sample, drawn in enumerate(new):
        end = next((place + 1 for place, token in enumerate(drawn) if token in stops), len(drawn))
        said = drawn[:end]
        found.append(
            {
                "ids": [*ids, *said],
                "speakers": [*prompt.spoken.speakers, *answer_speakers(lm, said, config.thinking)],
                "prompt": number,
                "sample": sample,
                "text": lm.decode(said),
            }
        )
    return found


def answer_speakers(lm: LanguageModel, said: Sequence[int], tags: tuple[str, str]) -> list[int]:
    """Who speaks at each token of an answer: thinking between the tags, or behind one that was never closed."""
    strings = lm.token_strings(list(said))
    text = "".join(strings)
    opened = text.find(tags[0])
    closed = text.find(tags[1], max(opened, 0))
    if opened < 0:
        return [NUMBER["assistant"]] * len(said)
    end = len(text) if closed < 0 else closed + len(tags[1])
    found: list[int] = []
    at = 0
    for string in strings:
        found.append(NUMBER["thinking" if opened < at + len(string) and at < end else "assistant"])
        at += len(string)
    return found
