"""Records circuit-tracer's transcoder sets and cross-layer transcoders with circuit-tracer 0.5.0 and torch 2.13.0.

The peer writes the layers and reads them back; the files of mid-2025 (`W_dec [d, F]`), and its top-k, which its loader
no longer reads from a config, are put together from its classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, load_transcoder_set
from safetensors.torch import load_file, save_file
from scopes_recording import LAYERS, ROWS, D, F, Weights, fresh, gates, record
from torch import Tensor

CPU = torch.device("cpu")
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
VERSION = "0.5.0"


def config(out: Path, kind: str, **more: object) -> None:
    """`config.yaml`."""
    tree = {"model_name": "google/gemma-2-2b", "model_kind": kind, "scan": "tiny", **HOOKS, **more}
    (out / "config.yaml").write_text(yaml.safe_dump(tree))


def layer(draw: Weights, i: int, activation: str, skip: bool) -> SingleLayerTranscoder:
    """One transcoder of the peer, filled."""
    functions = {"relu": torch.relu, "topk": TopK(6), "jumprelu": JumpReLU(draw.between(0.1, 1.2, F), 0.1)}
    made = SingleLayerTranscoder(D, F, functions[activation], i, skip, device=CPU, dtype=torch.float32)
    w = draw.affine()
    w["W_enc"] = w["W_enc"].T
    # Many rows without 6 positive pre-activations: the peer's top-k then keeps negative values.
    w["b_enc"] -= 1.5 if activation == "topk" else 0.2
    if skip:
        w["W_skip"] = draw.normal(D, D, scale=0.3)
    made.load_state_dict(w, strict=False)
    return made


def transcoders(kind: str, seed: int, activation: str, *, skip: bool = False, old: bool = False) -> None:
    """A set of one transcoder a layer."""
    draw, out = Weights(seed), fresh("circuit_tracer", kind)
    more = {"activation": "topk", "k": 6} if activation == "topk" else {}
    config(out, "transcoder_set", **more)
    expected: dict[str, Tensor] = {}
    made = [layer(draw, i, activation, skip) for i in range(LAYERS)]
    for i, theirs in enumerate(made):
        theirs.to_safetensors(str(out / f"layer_{i}.safetensors"))
    if activation != "topk":
        paths = {i: str(out / f"layer_{i}.safetensors") for i in range(LAYERS)}
        hooks = HOOKS["feature_input_hook"], HOOKS["feature_output_hook"]
        made = list(load_transcoder_set(paths, "tiny", *hooks, device=CPU, lazy_encoder=False, lazy_decoder=False))
    for i, theirs in enumerate(made):
        x = draw.normal(ROWS, D, scale=1.5)
        acts = theirs.encode(x)
        if activation == "jumprelu":
            gates(theirs.encode(x, apply_activation_function=False), acts)
        expected |= {f"x.{i}": x, f"acts.{i}": acts, f"recon.{i}": theirs.decode(acts, x)}
    if old:
        for path in out.glob("layer_*.safetensors"):
            state = load_file(path)
            save_file(state | {"W_dec": state["W_dec"].T.contiguous()}, path)
    record(out, ".", expected, "circuit-tracer", version=VERSION, transcribed=False)


def clt(kind: str, seed: int, activation: str) -> None:
    """A cross-layer transcoder."""
    draw, out = Weights(seed), fresh("circuit_tracer_clt", kind)
    config(out, "cross_layer_transcoder")
    theirs = CrossLayerTranscoder(
        LAYERS, F, D, activation, lazy_decoder=False, device=CPU, dtype=torch.float32, **HOOKS
    )
    for name, parameter in theirs.named_parameters():
        if name.endswith("threshold"):
            parameter.copy_(draw.between(0.1, 1.2, *parameter.shape))
        else:
            parameter.copy_(draw.normal(*parameter.shape, scale=0.3))
    theirs.to_safetensors(str(out))
    theirs = load_clt(str(out), **HOOKS, device=CPU, dtype=torch.float32, lazy_decoder=False)
    x = draw.normal(LAYERS, ROWS, D, scale=1.5)
    acts = theirs.encode(x)
    if activation == "jump_relu":
        gates(torch.cat([theirs.encode_layer(x[i], i, apply_activation_function=False) for i in range(LAYERS)]), acts)
    output = theirs.decode(acts)
    expected: dict[str, Tensor] = {}
    for i in range(LAYERS):
        expected |= {f"x.{i}": x[i], f"acts.{i}": acts[i], f"recon.{i}": output[i]}
    record(out, ".", expected, "circuit-tracer", version=VERSION, transcribed=False)


@torch.no_grad()
def main() -> None:
    """Write every kind."""
    transcoders("relu", 51, "relu")
    transcoders("jumprelu_skip", 52, "jumprelu", skip=True)
    transcoders("topk", 53, "topk")
    transcoders("relu_mid_2025", 54, "relu", skip=True, old=True)
    clt("relu", 55, "relu")
    clt("jumprelu", 56, "jump_relu")


if __name__ == "__main__":
    main()
