"""Which dtype and device a model is given when nobody says (decision 10)."""

from __future__ import annotations

import torch

from unmix.core.errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """The CUDA card where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware.

    For CPUs torch's own `_is_mkldnn_bf16_supported` is not the test: it is true on every AVX-512 machine, most of
    which emulate bfloat16 slower than they run float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
    return False


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`dtype` as given, or bfloat16 where `device` has it, else float32. `ModelError` for an unknown name."""
    if dtype is None:
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ModelError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def choose_device(device: str | torch.device | None) -> torch.device:
    """`device` as given or the default; `ModelError` where this machine has no such device."""
    try:
        chosen = default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {chosen}: this machine has no CUDA card that torch can use")
    if str(chosen) == "cuda":
        # The current card; tensors there say "cuda:0", and devices are compared.
        return torch.device("cuda", torch.cuda.current_device())
    return chosen
