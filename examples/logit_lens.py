# %% [markdown]
# # The logit lens of latents
#
# A latent writes its decoder row into the residual stream. Read through the model's own head, that row says which
# tokens the latent argues for: a name for latents near the end of the model, and a hint for earlier ones.

# %%
import os
from pathlib import Path

import unmix
from unmix.data import TokenShards
from unmix.lm.attribute import as_token_set, token_sets

RUN = Path(os.environ.get("UNMIX_RUN", "runs/demo"))
lm = unmix.load_model("builtin:smollm2", dtype="float32")
coder = next(iter(unmix.load_all(RUN / "coders").values()))

# %% [markdown]
# ## The latents with the most to say
#
# Most rows of logits look like a bell. Latents that argue for few tokens have a long right tail: skewness and kurtosis
# find them without looking at any text.

# %%
logits = unmix.direct_logits(lm, coder, range(coder.n_latents))
shape = logits.statistics()
loud = shape["kurtosis"].topk(12).indices.tolist()
best = unmix.direct_logits(lm, coder, loud).top(6)
for latent, tokens in zip(loud, best, strict=True):
    up = " ".join(repr(t.string) for t in tokens)
    print(f"{latent:5d}  kurtosis {shape['kurtosis'][latent]:6.1f}  skew {shape['skewness'][latent]:+.2f}   {up}")

# %% [markdown]
# ## Latents for a set of tokens
#
# Which latents raise a whole set against the rest of the vocabulary? For each the chance that a token of the set has
# the larger logit, and Mann and Whitney's test, with false discoveries held down over everything asked at once.

# %%
sets = {
    "numbers": as_token_set(lm, ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]),
    "pronouns": as_token_set(lm, ["he", "she", "they", "it", "him", "her", "them", "his", "their", "its"]),
    "line breaks": token_sets(lm)["line breaks"],
}
ranked = unmix.token_set_enrichment(logits, sets)
for name in sets:
    for row in [r for r in ranked if r.name == name][:4]:
        tokens = " ".join(repr(t.string) for t in unmix.direct_logits(lm, coder, row.latent).top(5)[0])
        print(f"{name:12} latent {row.latent:5d}  auc {row.auc:.3f}  q {row.q:.1e}   {tokens}")

# %% [markdown]
# ## Relatives
#
# Latents whose decoder rows point the same way often share a subject.

# %%
for latent, relatives in zip(loud[:3], unmix.decoder_neighbours(coder, loud[:3], 3), strict=True):
    print(latent, [(n.latent, round(n.cosine, 2)) for n in relatives])

# %% [markdown]
# ## Is it true?
#
# A row of the lens is an argument, not an effect: later layers may disagree. Where the latent fires, take it away and
# see which tokens lose.

# %%
contexts = int(os.environ.get("UNMIX_TOKENS", "8192")) // 128
for effect in unmix.ablation_effect(lm, coder, loud[:3], TokenShards.open(RUN / "tokens"), contexts=contexts):
    lost = " ".join(repr(t.string) for t in effect.raised[:6])
    print(f"latent {effect.latent}: {effect.firings} firings, KL there {effect.kl:.4f}; without it fall {lost}")
