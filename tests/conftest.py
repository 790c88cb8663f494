"""What every test gets: shapes checked at run time, no network, the same seeds, one thread a worker."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent

# Set before transformers, datasets or torch are imported anywhere. The GGUF cache ($UNMIX_CACHE) stays the user's own:
# turning the demo's model into tensors takes 14 s, once for a machine instead of once a session.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)

if any(name == "unmix" or name.startswith("unmix.") for name in sys.modules):
    raise RuntimeError("a pytest plugin imported unmix before the shape-checking hook was installed")
_hook = install_import_hook("unmix", "shapecheck.checked")


def pytest_configure(config: pytest.Config) -> None:
    """One thread a worker: two workers with two threads each fight over two cores and lose a third of the speed."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    """Global generators start from the same place in every test, whatever ran before it."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded peers' outputs and real text, which lies beside some checkouts; skips elsewhere."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(
            "needs ../shared (recorded outputs of other libraries, real text), which is not part of the project"
        )
    return folder


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Some English paragraphs that every Python brings along: the interpreter's own manual."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())][:60]


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 512 tokens, trained here, saved as transformers saves one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|begin|>", model_max_length=1024
    )
    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_tokenizer(tiny_tokenizer_folder: Path) -> Iterator[object]:
    """The tokenizer of `tiny_tokenizer_folder`, loaded afresh (tests may change its settings)."""
    from transformers import PreTrainedTokenizerFast

    yield PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, width 32, the tiny tokenizer; random weights from a fixed seed."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=256, bos_token_id=1, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return folder
