"""Kill `lm-train` anywhere, run it again: weights, tokenizer, metrics and samples are the same, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [
    "step@2", "step@9", "saving@2", "manifest@2", "exchange@1", "line", "tokenizer", "tokens",
    "result@1", "model", "sample@3", "step@5:saving@1:model:result@1",
]  # fmt: skip
SAME = (
    "model/model.safetensors", "model/config.json", "model/tokenizer.json", "metrics.jsonl", "result.json",
    "sample.txt", "tokenizer/tokenizer.json", "tokens/manifest.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: Path, text: Path) -> Path:
    """One folder a case, and `straight`, which was never interrupted."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "train.language.killed", str(folder), str(text), *CASES]
    paths = os.pathsep.join([str(root / "src"), str(root / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_bit_identical(trained: Path, case: str) -> None:
    for name in SAME:
        assert (trained / case / name).read_bytes() == (trained / "straight" / name).read_bytes(), name
    left = [path.name for path in (trained / case).rglob(".*") if path.name != ".lock"]
    assert left == []
    assert not (trained / case / "checkpoint").exists()


def test_the_log_holds_what_was_due(trained: Path) -> None:
    lines = (trained / "straight" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [3, 5, 6, 9, 10]
    assert [record["step"] for record in records if "held_out_loss" in record] == [5, 10]
    assert [record["tokens"] for record in records] == [256 * record["step"] for record in records]
