"""Records Gemma Scope 1 and 2: run with torch 2.13.0, numpy, safetensors and circuit-tracer 0.5.0 installed.

No package of DeepMind's holds the maths, which the releases give as a formula; circuit-tracer's loaders of the
transcoders are run beside it and must agree. Its loader of the cross-layer transcoders drops the last layer
(`range(max(paths))`), so it is handed one path more than there are layers; its forward fails where there is a skip,
so encode and decode are called.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    load_gemma_scope_2_transcoder,
    load_gemma_scope_transcoder,
)
from scopes_recording import LAYERS, ROWS, D, F, Weights, fresh, gates, record, save
from torch import Tensor

FORMULA = "f = relu(z) where z > threshold, z = x W_enc + b_enc; f W_dec + b_dec (+ x affine)"


def jumprelu(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and output."""
    z = x @ w["W_enc"] + w["b_enc"]
    acts = torch.relu(z) * (z > w["threshold"])
    gates(z, acts)
    return acts, acts @ w["W_dec"] + w["b_dec"]


def thresholded(draw: Weights, **sizes: int) -> dict[str, Tensor]:
    """An affine coder with a threshold a latent."""
    return draw.affine(**sizes) | {"threshold": draw.between(0.1, 1.2, F)}


def scope_1(kind: str, seed: int, repo: str, folder: str, *, lower: bool = False, d: int = D) -> None:
    """One `params.npz`."""
    draw, out = Weights(seed), fresh("gemma_scope", kind)
    w, x = thresholded(draw, d_in=d, d_out=d), draw.normal(ROWS, d, scale=1.5)
    place = f"{repo}/{folder}"
    (out / place).mkdir(parents=True)
    names = {k: k.lower() if lower else k for k in w}
    np.savez(out / place / "params.npz", **{names[k]: v.numpy() for k, v in w.items()})
    # As trained; the recorded input of an embedding coder is unscaled, on scaled embeddings its maths is the same.
    acts, recon = jumprelu(w, x)
    scale = d**0.5 if folder.startswith("embedding") else 1.0
    expected = {"x": x * scale, "acts": acts, "recon": recon * scale}
    peer, transcribed = FORMULA, True
    if kind == "transcoder":
        theirs = load_gemma_scope_transcoder(str(out / place / "params.npz"), 3, device=torch.device("cpu"))
        assert torch.allclose(theirs.encode(x), acts) and torch.allclose(theirs(x), recon, atol=1e-5)
        expected = {"x": x, "acts": theirs.encode(x), "recon": theirs(x)}
        peer, transcribed = "circuit-tracer 0.5.0", False
    record(out, place, expected, peer, transcribed=transcribed)


def config(out: Path, kind: str, read: str, written: str, l0: int, affine: bool) -> None:
    """`config.json` as published."""
    tree = {
        "hf_hook_point_in": read, "hf_hook_point_out": written, "width": F, "model_name": "google/gemma-3-1b-pt",
        "architecture": "jump_relu", "l0": l0, "affine_connection": affine, "type": kind,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(tree))


def stored(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the second release."""
    return {{"W_enc": "w_enc", "W_dec": "w_dec"}.get(k, k): v for k, v in w.items()}


def scope_2(kind: str, seed: int, place: str, read: str, written: str, *, transcoder: bool, affine: bool) -> None:
    """One `params.safetensors` with its config."""
    draw, out = Weights(seed), fresh("gemma_scope_2", kind)
    w, x = thresholded(draw), draw.normal(ROWS, D, scale=1.5)
    if affine:
        w["affine_skip_connection"] = draw.normal(D, D, scale=0.3)
    save(out / place / "params.safetensors", stored(w))
    config(out / place, "transcoder" if transcoder else "sae", read, written, 50, affine)
    acts, recon = jumprelu(w, x)
    peer, transcribed = FORMULA, True
    if affine:
        recon = recon + x @ w["affine_skip_connection"]
    if transcoder:
        path = str(out / place / "params.safetensors")
        theirs = load_gemma_scope_2_transcoder(path, 3, device=torch.device("cpu"))
        assert torch.allclose(theirs.encode(x), acts) and torch.allclose(theirs(x), recon, atol=1e-5)
        acts, recon, peer, transcribed = theirs.encode(x), theirs(x), "circuit-tracer 0.5.0", False
    record(out, place, {"x": x, "acts": acts, "recon": recon}, peer, transcribed=transcribed)


def several(kind: str, seed: int, place: str, layers: list[int], *, crosscoder: bool, affine: bool) -> None:
    """`params_layer_{i}.safetensors`: each layer's latents read it alone and write it and those after it."""
    draw, out = Weights(seed), fresh("gemma_scope_2_crosscoder" if crosscoder else "gemma_scope_2_clt", kind)
    n = len(layers)
    expected: dict[str, Tensor] = {}
    recon = [torch.zeros(ROWS, D) for _ in layers]
    paths: dict[int, str] = {}
    for i, layer in enumerate(layers):
        w, x = thresholded(draw), draw.normal(ROWS, D, scale=1.5)
        w["W_dec"] = draw.normal(F, n, D, scale=0.4)
        w["W_dec"][:, :i] = 0
        if affine:
            w["affine_skip_connection"] = draw.normal(D, D, scale=0.3)
        path = out / place / f"params_layer_{i}.safetensors"
        save(path, stored(w))
        paths[i] = str(path)
        acts, _ = jumprelu(w | {"W_dec": w["W_dec"].flatten(1), "b_dec": torch.zeros(n * D)}, x)
        expected |= {f"x.{layer}": x, f"acts.{layer}": acts}
        for j in range(i, n):
            recon[j] = recon[j] + acts @ w["W_dec"][:, j]
        recon[i] = recon[i] + w["b_dec"] + (x @ w["affine_skip_connection"] if affine else 0.0)
    names = "{all}" if not crosscoder else "{" + ",".join(map(str, layers)) + "}"
    if crosscoder:
        config(out / place, "crosscoder", f"model.layers.{names}.output", f"model.layers.{names}.output", 50, affine)
    else:
        read, written = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        hooks = [f"model.layers.{names}.{name}.output" for name in (read, written)]
        config(out / place, "clt", *hooks, 150, affine)
    peer, transcribed = FORMULA, True
    if not crosscoder:
        theirs = load_gemma_scope_2_clt(paths | {n: paths[n - 1]}, device=torch.device("cpu"), dtype=torch.float32)
        x = torch.stack([expected[f"x.{layer}"] for layer in layers])
        acts = theirs.encode(x)
        output = theirs.decode(acts, x)
        assert torch.allclose(acts, torch.stack([expected[f"acts.{layer}"] for layer in layers]))
        assert torch.allclose(output, torch.stack(recon), atol=1e-5)
        expected |= {f"acts.{layer}": acts[i] for i, layer in enumerate(layers)}
        recon, peer, transcribed = list(output), "circuit-tracer 0.5.0", False
    expected |= {f"recon.{layer}": recon[i] for i, layer in enumerate(layers)}
    record(out, place, expected, peer, transcribed=transcribed)


@torch.no_grad()
def main() -> None:
    """Write every kind."""
    repo = "google/gemma-scope-2b-pt"
    scope_1("res", 1, f"{repo}-res", "layer_3/width_48/average_l0_5")
    scope_1("mlp_lower_case", 2, f"{repo}-mlp", "layer_3/width_48/average_l0_71", lower=True)
    scope_1("att", 3, f"{repo}-att", "layer_2/width_48/average_l0_5", d=24)
    scope_1("embedding", 4, f"{repo}-res", "embedding/width_48/average_l0_6")
    scope_1("transcoder", 5, f"{repo}-transcoders", "layer_3/width_48/average_l0_76")
    layer = "google/gemma-scope-2-1b-pt/{}/layer_3_width_48_l0_medium"
    out, before, after = (
        "model.layers.3.output", "model.layers.3.pre_feedforward_layernorm.output",
        "model.layers.3.post_feedforward_layernorm.output",
    )  # fmt: skip
    heads = "model.layers.3.self_attn.o_proj.input"
    scope_2("resid_post", 6, layer.format("resid_post"), out, out, transcoder=False, affine=False)
    scope_2("attn_out", 7, layer.format("attn_out_all"), heads, heads, transcoder=False, affine=False)
    scope_2("mlp_out", 8, layer.format("mlp_out") + "_seed_1", after, after, transcoder=False, affine=False)
    scope_2("transcoder", 9, layer.format("transcoder"), before, after, transcoder=True, affine=False)
    scope_2("affine", 10, layer.format("transcoder_all") + "_affine", before, after, transcoder=True, affine=True)
    place = "google/gemma-scope-2-1b-pt/clt/width_144_l0_big"
    several("clt", 11, place, list(range(LAYERS)), crosscoder=False, affine=False)
    several("clt_affine", 12, f"{place}_affine", list(range(LAYERS)), crosscoder=False, affine=True)
    place = "google/gemma-scope-2-1b-pt/crosscoder/layer_1_4_7_width_144_l0_medium"
    several("crosscoder", 13, place, [1, 4, 7], crosscoder=True, affine=False)


if __name__ == "__main__":
    main()
