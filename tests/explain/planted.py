"""A small index of made-up text in which every latent's rule is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from unmix.coder.codes import Codes
from unmix.data.config import ROLES
from unmix.index.build import IndexBatch, build_index
from unmix.index.reader import LatentIndex

VOCAB = [
    "<|end|>", " the", " of", " cat", " Cat", "cat", " dog", " Dog", " house", " red", " blue", " green", " small",
    " return", "return", " Return", " def", " foo", " bar", " baz", " qux", " transfor", " ham", "mer", "\n", "    ",
    ".", ",", " 1", " 2", " 3", " (", ")", " walk", " walks", " walked", " walking", " sea", " sky", " sun",
]  # fmt: skip
ID = {token: i for i, token in enumerate(VOCAB)}
CONTEXT, CONTEXTS = 48, 500
PLANTED = {
    "cat after the": 0, "return": 1, "noise": 2, "after def": 3, "dead": 4, "dense": 5, "transformer": 6,
    "never in score": 7, "only in score": 8, "walk": 9, "numbers": 10, "dog, weakly": 11,
}  # fmt: skip
CAT, RETURN, NOISE, DEF, DEAD, DENSE, TRANSFORMER, UNSCORED, UNSEEN, WALK, NUMBERS, DOG = range(12)
NAME = "layers.1"


def tokens_and_codes(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(tokens [contexts, CONTEXT], roles [contexts], dense codes [contexts, CONTEXT, latents])`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, len(VOCAB), (CONTEXTS, CONTEXT))
    # Natural contexts for the rules, beside the same tokens elsewhere.
    for before, after, share in ((" the", " cat", 0.3), (" transfor", "mer", 0.5), (" ham", "mer", 0.4)):
        rows, places = np.nonzero(tokens[:, :-1] == ID[before])
        keep = rng.random(len(rows)) < share
        tokens[rows[keep], places[keep] + 1] = ID[after]
    roles = np.resize([0, 0, 0, 2, 3, 3, 1, 0, 0, 3], CONTEXTS).astype(np.uint8)
    before = np.concatenate([np.zeros((CONTEXTS, 1), np.int64), tokens[:, :-1]], axis=1)
    cats, dogs = (np.isin(tokens, [ID[t] for t in names]) for names in ((" cat", " Cat", "cat"), (" dog", " Dog")))
    codes = np.zeros((CONTEXTS, CONTEXT, len(PLANTED)), np.float32)
    strength = rng.uniform(2, 4, tokens.shape).astype(np.float32)
    rules = {
        CAT: cats & (before == ID[" the"]),
        RETURN: np.isin(tokens, [ID[t] for t in (" return", "return", " Return")]),
        NOISE: rng.random(tokens.shape) < 0.01,
        DEF: before == ID[" def"],
        DENSE: rng.random(tokens.shape) < 0.3,
        TRANSFORMER: (tokens == ID["mer"]) & (before == ID[" transfor"]),
        UNSCORED: (tokens == ID[" sea"]) & (roles != ROLES.index("score"))[:, None],
        UNSEEN: (tokens == ID[" sky"]) & (roles == ROLES.index("score"))[:, None],
        WALK: np.isin(tokens, [ID[t] for t in VOCAB if t.startswith(" walk")]),
        NUMBERS: np.isin(tokens, [ID[t] for t in (" 1", " 2", " 3")]),
        DOG: dogs & (rng.random(tokens.shape) < 0.25),
    }
    for latent, fires in rules.items():
        codes[..., latent] = np.where(fires, strength, 0)
    codes[:, 0] = 0
    return tokens, roles, codes


def planted_index(folder: Path, vocab: bool = True) -> LatentIndex:
    """The planted text as an index folder; the first position of every context is masked."""
    tokens, roles, codes = tokens_and_codes()
    mask = np.ones(tokens.shape, bool)
    mask[:, 0] = False
    documents = np.repeat(np.arange(CONTEXTS)[:, None], CONTEXT, 1)
    batch = IndexBatch(tokens, roles, documents, mask, {NAME: Codes.from_dense(torch.from_numpy(codes))})
    meta = {"coder_hash": {NAME: "c0de"}}
    names = VOCAB if vocab else None
    return build_index(folder, [batch], {NAME: len(PLANTED)}, CONTEXT, meta=meta, vocab=names, vocab_size=len(VOCAB))
