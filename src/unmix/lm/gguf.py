"""GGUF files: dequantised once by transformers, then kept as an ordinary folder in the user's cache.

The cached weights are float32. Dequantised Q4_1 weights are a half-precision scale times 4 bits plus a
half-precision offset, and 211 of SmolLM2's 272 tensors change when rounded to bfloat16 or float16; in float32 all
are exact. It costs disk (538 MB for the 98 MB file) and buys one cache that is right for every dtype asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unmix.core.atomic import atomic_folder, sha256_file
from unmix.core.errors import CorruptError, MachineError, ModelError
from unmix.core.manifest import require_whole, write_manifest
from unmix.core.progress import log

KIND = "converted-gguf"
_MAGIC = b"GGUF"


def cache_root() -> Path:
    """`$UNMIX_CACHE/models`, else `~/.cache/unmix/models`."""
    base = os.environ.get("UNMIX_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "unmix") / "models"


def converted(file: Path) -> Path:
    """The folder with the dequantised model of `file`, made on the first call (about 15 s for 135 M weights).

    The folder is named by the file's SHA-256, so another file never finds it. A folder that is not whole is made
    again. Raises `ModelError` for a file that is not GGUF or is cut short.
    """
    folder = cache_root() / sha256_file(file)
    if _is_whole(folder):
        return folder
    # Only now: reading the headers takes seconds where they hold a vocabulary.
    check_gguf(file)
    log.info("%s: converting to %s, once", file.name, folder)
    model, tokenizer = _dequantise(file)
    try:
        with atomic_folder(folder) as temp:
            _save(model, tokenizer, temp)
            write_manifest(temp, KIND, source=file.name)
    except MachineError:
        raise
    except OSError:
        # Another process put its own copy there between our look and our rename.
        if not _is_whole(folder):
            raise
    return folder


def check_gguf(file: Path) -> None:
    """`ModelError` where the file does not begin like GGUF or its tensors run past its end."""
    with file.open("rb") as handle:
        head = handle.read(4)
    if head != _MAGIC:
        raise ModelError(f"{file}: not a GGUF file: it begins with {head!r}, expected {_MAGIC!r}")
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(str(file)).tensors
    except Exception as error:
        raise ModelError(f"{file}: corrupt GGUF file ({file.stat().st_size} bytes): {error}") from None
    if not tensors:
        raise ModelError(f"{file}: this GGUF file holds no tensors")


def _is_whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        require_whole(folder, KIND)
    except CorruptError as error:
        log.warning("%s; converting again", error)
        return False
    return True


def _dequantise(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unmix.lm.load import quiet_bars

    where = {"gguf_file": file.name}
    try:
        with quiet_bars():
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{file}: transformers cannot read this GGUF file: {first}") from error
    return model, tokenizer


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights, config and tokenizer as an ordinary folder.

    `save_pretrained` refuses a model that came from GGUF ("quantized with gguf and is not serializable"), although
    its weights are plain by then; so the weights are written by themselves and the config without the quantiser.
    """
    from safetensors.torch import save_file

    named = {name: tensor.contiguous() for name, tensor in model.named_parameters()}
    buffers = dict(model.named_buffers())
    kept = {name: buffers[name] for name in model.state_dict() if name in buffers}
    save_file({**named, **kept}, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    type(model.config).from_dict(config).save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
