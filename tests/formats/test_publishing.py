"""`push_to_hub` against the stand-in hub: repositories, commits, large files, cards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from formats.sources.standin import Hub, running
from unmix.coder.config import CoderConfig, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, FormatError, NonFiniteError, ServiceError
from unmix.core.policy import ModelFingerprint
from unmix.formats import load
from unmix.formats.publishing import card, push_to_hub

# huggingface-hub's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TRAINING = {
    "train": {"lr": 0.0003, "tokens": 1000000},
    "data": {"path": "/home/somebody/secret-corpus", "source": "text"},
    "published": {"l0": 3.0},
    "evaluation": {"fvu": 0.123456, "dead": 0.01, "note": "x"},
    "source": {"format": "sae_lens", "place": "/home/somebody/sae"},
}


def made(**changes: object) -> SparseCoder:
    config = CoderConfig(
        reads=("blocks.3.resid_post",),
        d_in=8,
        n_latents=32,
        activation=TopK(k=3),
        model=ModelFingerprint(name="HuggingFaceTB/SmolLM2-135M"),
        training=TRAINING,
    )
    return SparseCoder(config.model_copy(update=changes), seed=1).eval()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    (tmp_path / "repo").mkdir()
    with running(Hub(tmp_path / "repo")) as server:
        yield server


def push(hub: Hub, coder: SparseCoder, **options: object) -> str:
    return push_to_hub(coder, "me/coders", endpoint=hub.url, token="hf_secret", **options)


def pulled(hub: Hub, folder: Path) -> Path:
    for name, data in hub.pushed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_what_is_pushed_loads_again(hub, tmp_path):
    coder = made()
    url = push(hub, coder, path_in_repo="layers.3/wide", private=True)
    assert url == f"{hub.url}/me/coders/tree/main/layers.3/wide"
    assert hub.repos["me/coders"].get("private") is True or hub.repos["me/coders"].get("visibility") == "private"
    assert sorted(hub.pushed) == [
        "README.md", "layers.3/wide/coder.safetensors", "layers.3/wide/config.json", "layers.3/wide/manifest.json",
    ]  # fmt: skip
    assert len(hub.objects) >= 1, "weights go up as large files"
    assert hub.tokens == {"Bearer hf_secret"}
    assert load(pulled(hub, tmp_path / "back") / "layers.3" / "wide").hash() == coder.hash()


def test_another_format(hub, tmp_path):
    coder = made()
    push(hub, coder, format="sae_lens", model_card=False)
    assert "README.md" not in hub.pushed and "sae_weights.safetensors" in hub.pushed
    x = torch.randn(5, 8)
    assert torch.allclose(load(pulled(hub, tmp_path / "back"))(x).reconstruction, coder(x).reconstruction, atol=1e-6)


def test_a_card_that_is_there_stays(hub):
    (hub.root / "README.md").write_text("mine")
    push(hub, made(), path_in_repo="x")
    assert "README.md" not in hub.pushed


def test_the_card(hub):
    text = card(made(), "me/coders", "layers.3", revision="v1")
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head) == {
        "library_name": "unmix",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "tags": ["unmix", "sparse-coder", "sparse-autoencoder", "topk", "interpretability"],
    }
    assert 'unmix.load("hf://me/coders@v1/layers.3")' in body
    assert "with 32 latents: it reads `blocks.3.resid_post`." in body
    assert "| Activation | topk (k 3, relu after) |" in body
    assert "| train | lr 0.0003, tokens 1,000,000 |" in body
    assert "| fvu | 0.1235 |" in body and "| l0 | 3 |" in body and "note" not in body
    assert "somebody" not in text, "no path of anybody's machine is published"


def test_names_in_a_card_cannot_break_out_of_it():
    text = card(made(name="a|b`<script>\n# c", model=ModelFingerprint(name="/home/me/model")), "me/coders")
    assert "<script>" not in text and "\n# c" not in text
    assert "base_model" not in text


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses(hub, status):
    hub.status = status
    with pytest.raises(FormatError, match=rf"me/coders: the hub refuses to write there \({status}\)") as caught:
        push(hub, made())
    assert "hf_secret" not in str(caught.value)


def test_a_hub_that_does_not_answer(hub):
    hub.status = 500
    with pytest.raises(ServiceError, match="me/coders: the hub does not answer"):
        push(hub, made())


def test_a_large_file_that_does_not_arrive_leaves_no_commit(hub):
    hub.refuses_objects = True
    with pytest.raises(ServiceError, match="me/coders: the hub does not answer"):
        push(hub, made())
    assert hub.pushed == {}


def test_what_cannot_be_pushed(hub):
    with pytest.raises(FormatError, match="expected owner/name"):
        push_to_hub(made(), "coders", endpoint=hub.url)
    with pytest.raises(FormatError, match=r"path_in_repo '\.\./x': expected a folder such as"):
        push(hub, made(), path_in_repo="../x")
    with pytest.raises(ConfigError, match="unknown format 'sae_lense'"):
        push(hub, made(), format="sae_lense")
    broken = made()
    with torch.no_grad():
        broken.W_dec[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        push(hub, broken)
    assert hub.repos == {} and hub.pushed == {}, "nothing was asked of the hub before the files were there"
