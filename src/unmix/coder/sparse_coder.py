"""SparseCoder: one module for every architecture. It knows no language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmix.coder.codes import Codes
from unmix.coder.config import CoderConfig
from unmix.coder.encoder import Encoder, make_encoder
from unmix.coder.hashing import coder_hash
from unmix.coder.normalise import FIXED, denormalise, normalise
from unmix.coder.sparse import sparse_decode
from unmix.core.errors import ConfigError
from unmix.core.seeds import derive


@dataclass(frozen=True)
class CoderOutput:
    """Codes and the reconstruction decoded from them `[*leading, d_out]`."""

    codes: Codes
    reconstruction: Tensor


class SparseCoder(nn.Module):
    """normalise → scale → (− b_pre) → encoder → codes → W_dec, b_dec (+ skip) → scale → de-normalise.

    Parameters are latent-major: row i of `W_enc [F, d_in]` and of `W_dec [F, d_out]` is latent i.
    Extra tensors of an activation (thresholds) are parameters too, under their own names.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, config: CoderConfig, seed: int = 0) -> None:
        """Fresh weights: unit-norm decoder rows at random, the encoder their copy, biases zero."""
        super().__init__()
        self.config = config
        self.encoder: Encoder = make_encoder(config.activation)
        self.statistics: dict[str, Tensor] = {}
        F, d_in, d_out = config.n_latents, config.d_in, config.width_out
        rows, enc = _fresh(config, seed)
        self.W_enc = nn.Parameter(enc)
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if config.pre_bias == "own":
            self.b_pre = nn.Parameter(torch.zeros(d_in))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))
        if config.gate_space == "own":
            self.gate_scale = nn.Parameter(torch.ones(F), requires_grad=False)
        if config.normalise.kind == "standardise":
            self.norm_mean = nn.Parameter(torch.zeros(d_in), requires_grad=False)
            self.norm_scale = nn.Parameter(torch.ones(d_in), requires_grad=False)
        self._extra_names: list[str] = []
        for name, value in self.encoder.parameters(F).items():
            self._extra_names.append(name)
            setattr(self, name, nn.Parameter(value, requires_grad=value.ndim > 0))

    @staticmethod
    def from_state(
        config: CoderConfig, state: Mapping[str, Tensor], statistics: Mapping[str, Tensor] | None = None
    ) -> SparseCoder:
        """A coder around existing tensors, in evaluation mode; nothing is copied and no weights are drawn.

        Decoder rows are made contiguous where they are not: decoding gathers them. `ConfigError` where names or
        shapes are not those of the coder's parameters.
        """
        with torch.device("meta"):
            coder = SparseCoder(config)
        expected = {name: tuple(t.shape) for name, t in coder.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in state.items()}
        if found != expected:
            raise ConfigError(f"{config.name}: tensors {found} do not fit the config, expected {expected}")
        coder.load_state_dict({**state, "W_dec": state["W_dec"].contiguous()}, assign=True)
        coder.statistics = dict(statistics or {})
        return coder.eval()

    @property
    def n_latents(self) -> int:
        """F."""
        return self.config.n_latents

    @property
    def name(self) -> str:
        """The coder's key in runs and results."""
        return self.config.name

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dictionary(self) -> Float[Tensor, "latents d_out"]:
        """Decoder rows at unit norm (rows of zeros stay zeros)."""
        return torch.nn.functional.normalize(self.W_dec.detach(), dim=-1)

    def extra(self) -> dict[str, Tensor]:
        """The activation's own tensors, by name."""
        return {name: getattr(self, name) for name in self._extra_names}

    def input_bias(self) -> Tensor | None:
        """What is subtracted before the encoder, if anything."""
        if self.config.pre_bias == "tied":
            return self.b_dec
        return self.b_pre if self.config.pre_bias == "own" else None

    def gate_factor(self) -> Tensor | None:
        """What the gate multiplies z by [F], where it does; no gradient flows through it."""
        if self.config.gate_space == "raw":
            return None
        if self.config.gate_space == "own":
            return self.gate_scale
        W_dec = self.W_dec.detach()
        if self.config.gate_space == "decoder_norm":
            return W_dec.norm(dim=-1)
        return torch.stack([part.norm(dim=-1) for part in W_dec.split(list(self.config.parts()), dim=-1)]).sum(0)

    def fixed(self) -> dict[str, Tensor]:
        """The stored vectors of the normalisation, by name."""
        return {name: getattr(self, name) for name in FIXED if hasattr(self, name)}

    def prepare(self, x: Float[Tensor, "rows d_in"]) -> tuple[Float[Tensor, "rows d_in"], dict[str, Tensor]]:
        """Normalised and scaled input in the coder's dtype, and the context that decoding needs back."""
        s, context = normalise(x.to(self.dtype), self.config.normalise, self.fixed())
        s = s * self.config.input_scale if self.config.input_scale != 1.0 else s
        if self.config.skip:
            context = {**context, "skip": s}
        return s, context

    @overload
    def encode(self, x: Tensor, context: Tensor | None = None, return_pre: Literal[False] = False) -> Codes: ...

    @overload
    def encode(
        self, x: Tensor, context: Tensor | None = None, *, return_pre: Literal[True]
    ) -> tuple[Codes, Tensor]: ...

    def encode(
        self, x: Float[Tensor, "*leading d_in"], context: Tensor | None = None, return_pre: bool = False
    ) -> Codes | tuple[Codes, Tensor]:
        """Codes of `x`; with `return_pre` also the dense pre-activations `[*leading, n_latents]`.

        Encoders that look at the sequence need x as `[..., sequences, tokens, d_in]`, or `context` [*leading]: the
        number of each token's sequence (`ConfigError` for bare rows, which could be of any).

        Raises `ValueError` where the last dimension of `x` is not `d_in`.
        """
        if x.shape[-1] != self.config.d_in:
            raise ValueError(f"{self.name}: input is {x.shape[-1]} wide, this coder reads d_in = {self.config.d_in}")
        leading = tuple(x.shape[:-1])
        s, carried = self.prepare(x.reshape(-1, x.shape[-1]))
        if context is None and self.encoder.sequential and len(leading) > 1:
            context = torch.arange(len(s), device=s.device) // leading[-1]
        codes = self.encoder.codes(self, s, context)
        carried = {**codes.context, **carried}
        shaped = {key: value.reshape(*leading, value.shape[-1]) for key, value in carried.items()}
        codes = replace(codes, leading=leading, context=shaped)
        if not return_pre:
            return codes
        return codes, self.encoder.pre_activations(self, s).view(*leading, self.n_latents)

    def decode(self, codes: Codes) -> Tensor:
        """The output `[*leading, d_out]`.

        `ValueError` where the codes are of another number of latents, or lack context that the coder needs.
        """
        if codes.n_latents != self.n_latents:
            raise ValueError(f"{self.name}: codes over {codes.n_latents} latents, this coder has {self.n_latents}")
        return self.decode_raw(
            codes.indices, codes.values, codes.offsets, codes.context.get("mean"), codes.context.get("std"),
            codes.context.get("skip"), codes.context.get("predicted"),
        ).view(*codes.leading, self.config.width_out)  # fmt: skip

    def decode_raw(
        self,
        indices: Tensor,
        values: Tensor,
        offsets: Tensor,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        skip: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Float[Tensor, "rows d_out"]:
        """Decode CSR arrays: latent ids [nnz], values [nnz], offsets [rows + 1], and context where it is needed."""
        y = sparse_decode(values.to(self.dtype), self.W_dec, indices, offsets) + self.b_dec
        if self.encoder.sequential:
            if predicted is None:
                raise ValueError(
                    f"{self.name}: decoding adds what earlier tokens predict, and these codes carry no context"
                )
            y = y + predicted.reshape(-1, predicted.shape[-1])
        return self.finish(y, mean, std, skip)

    def finish(
        self, y: Tensor, mean: Tensor | None = None, std: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """From the decoder's sum [rows, d_out] to the output: skip, scale, de-normalise."""
        if self.config.skip:
            if skip is None:
                raise ValueError(f"{self.name}: decoding adds a skip of the input, and these codes carry no context")
            y = y + skip.reshape(-1, skip.shape[-1]) @ self.W_skip.T
        if self.config.output_scale != 1.0:
            y = y * self.config.output_scale
        flat = [None if t is None else t.reshape(-1, 1) for t in (mean, std)]
        return denormalise(y, self.config.normalise, flat[0], flat[1], self.fixed())

    def forward(self, x: Float[Tensor, "*leading d_in"]) -> CoderOutput:
        """Encode and decode."""
        codes = self.encode(x)
        return CoderOutput(codes, self.decode(codes))

    def hash(self) -> str:
        """SHA-256 (16 hex digits) of config and weights: two coders with one hash compute the same."""
        return coder_hash(self.config, sorted(self.state_dict().items()))

    def save(self, folder: str | Path) -> None:
        """Write the native folder (`config.json`, `coder.safetensors`, `manifest.json`), atomically."""
        from unmix.coder.native import save_native

        save_native(self, folder)

    def convert(self, folder: str | Path, format: str) -> None:
        """Write the coder to the new folder in another layout; see `unmix.convert`."""
        from unmix.formats.loading import convert

        convert(self, folder, format)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put the coder into a repository on the hub, with a model card; see `unmix.formats.publishing.push_to_hub`."""
        from unmix.formats.publishing import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def split_writes(self, output: Tensor, widths: list[int]) -> list[Tensor]:
        """The output cut into one part for each write hook."""
        if len(widths) != len(self.config.writes) or sum(widths) != self.config.width_out:
            raise ConfigError(
                f"{self.name} writes {len(self.config.writes)} hooks of {self.config.width_out} in all, "
                f"found widths {widths}"
            )
        return list(output.split(widths, dim=-1))

    def __repr__(self) -> str:
        """One line: name, sizes, activation, hooks."""
        c = self.config
        hooks = " → ".join(dict.fromkeys([" + ".join(c.reads), " + ".join(c.writes)]))
        return f"SparseCoder({c.name!r}, d_in={c.d_in}, n_latents={c.n_latents}, {c.activation!r}, {hooks})"


def _fresh(config: CoderConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Random decoder rows [F, d_out] of unit norm, and an encoder [F, d_in] to go with them."""
    F, d_in, d_out = config.n_latents, config.d_in, config.width_out
    if torch.get_default_device().type == "meta":
        return torch.empty(F, d_out), torch.empty(F, d_in)
    generator = torch.Generator().manual_seed(derive(seed, "coder", config.name))
    rows = torch.nn.functional.normalize(torch.randn(F, d_out, generator=generator), dim=-1)
    return rows, rows.clone() if d_in == d_out else torch.randn(F, d_in, generator=generator) / d_in**0.5
