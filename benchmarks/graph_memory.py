"""Memory of an attribution graph at a long context: `python -m benchmarks.graph_memory --tokens 4096`.

The demo's model (float32 unless `--dtype` says otherwise) with a transcoder on each of its 30 layers (random weights:
memory does not depend on them), the logits' rows and those of the most influential latents. Prints the process's peak,
so nothing else runs in it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from unmix.coder.config import CoderConfig, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.policy import InputPolicy
from unmix.data.config import DataConfig
from unmix.data.corpora import open_corpus
from unmix.lm.graphs import attribution_graph
from unmix.lm.load import load_model


def main() -> None:
    """Build one graph and print seconds and bytes."""
    words = argparse.ArgumentParser()
    words.add_argument("--tokens", type=int, default=4096)
    words.add_argument("--latents", type=int, default=8, help="latents whose own causes are worked out")
    words.add_argument("--k", type=int, default=16)
    words.add_argument("--n-latents", type=int, default=2304)
    words.add_argument("--memory", type=float, default=2.0, help="GiB for the stored pass")
    words.add_argument("--dtype", default="float32")
    given = words.parse_args()
    lm = load_model("builtin:smollm2", dtype=given.dtype)
    coders = [_transcoder(layer, lm.d_model, given.n_latents, given.k) for layer in range(lm.n_layers)]
    text = " ".join(document.text for document, _ in zip(open_corpus(DataConfig()), range(200), strict=False))
    tokens = lm.encode_text(text)[: given.tokens]
    before = _peak()
    start = time.perf_counter()
    graph = attribution_graph(
        lm, coders, tokens, max_logits=3, max_latents=given.latents, memory=int(given.memory * 2**30)
    )
    seconds = time.perf_counter() - start
    latents = len(tokens) * given.k * lm.n_layers
    sys.stdout.write(
        f"tokens {len(tokens)}, active latents {latents:,}, rows {given.latents + 3}: {seconds:.0f} s, "
        f"peak {_peak():.2f} GiB (of it {before:.2f} before the graph: model and coders)\n"
        f"{len(graph.nodes):,} nodes, {len(graph.edges):,} edges, {graph.unexpanded:.0%} of the influence unexpanded\n"
    )


def _transcoder(layer: int, width: int, n_latents: int, k: int) -> SparseCoder:
    config = CoderConfig(
        name=f"l{layer}", reads=(f"blocks.{layer}.mlp_in",), writes=(f"blocks.{layer}.mlp_out",), d_in=width,
        d_out=width, n_latents=n_latents, activation=TopK(k=k), pre_bias="none",
        input_policy=InputPolicy(bos="none", skip_first=0),
    )  # fmt: skip
    return SparseCoder(config, seed=layer).eval().requires_grad_(False)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
