"""Writes a two-layer Llama as a GGUF file, so that the GGUF path is tested without any download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

D, FF, HEADS, LAYERS, VOCAB = 64, 128, 4, 2, 96


def write(path: Path) -> dict[str, np.ndarray]:
    """Write the file; the embedding is Q4_1, so that dequantising matters. The float32 weights, by GGUF name."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<s>", "</s>", *[chr(33 + i) for i in range(VOCAB - 4)], "ab", "bc"]
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "b c"])
    writer.add_token_types([int(TokenType.CONTROL)] * 2 + [int(TokenType.NORMAL)] * (VOCAB - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    weights = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,), "output.weight": (VOCAB, D)}
    for i in range(LAYERS):
        weights |= {f"blk.{i}.attn_norm.weight": (D,), f"blk.{i}.ffn_norm.weight": (D,)}
        weights |= {f"blk.{i}.attn_{n}.weight": (D, D) for n in ("q", "k", "v", "output")}
        weights |= {f"blk.{i}.ffn_gate.weight": (FF, D), f"blk.{i}.ffn_up.weight": (FF, D)}
        weights |= {f"blk.{i}.ffn_down.weight": (D, FF)}
    made: dict[str, np.ndarray] = {}
    for name, shape in weights.items():
        made[name] = (random.standard_normal(shape) / 8 + (len(shape) == 1)).astype(np.float32)
        if name == "token_embd.weight":
            packed = quantize(made[name], GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_shape=packed.shape, raw_dtype=GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, made[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made
