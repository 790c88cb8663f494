# %% [markdown]
# # Evaluate your sparse autoencoder
#
# Is it any good? Three questions: how many latents does a token take (L0), how much of the activation do they give
# back (FVU), and what does the language model lose when it has to live on the reconstruction (cross-entropy)?
#
# Any coder that `unmix.load` opens will do. This page uses the one that `make demo` trains; `UNMIX_RUN` names another
# run folder.

# %%
import os
from pathlib import Path

import torch

import unmix
from unmix.data import TokenShards

RUN = Path(os.environ.get("UNMIX_RUN", "runs/demo"))
TOKENS = int(os.environ.get("UNMIX_TOKENS", "8192"))
lm = unmix.load_model("builtin:smollm2")
coders = unmix.load_all(RUN / "coders")
coder = next(iter(coders.values()))
coder

# %% [markdown]
# ## On text that it was not trained on
#
# A run keeps its tokens, and deals documents to roles by a hash of their text: those of `evaluate` were never trained
# on. (Any token ids [contexts, positions] will do in their place.) In brackets: 95 % bootstrap intervals over contexts.

# %%
shards = TokenShards.open(RUN / "tokens")
result = unmix.evaluate(coder, lm, shards, tokens=TOKENS)
for name in ("l0", "fvu", "cosine", "ce_orig", "ce_spliced", "ce_ablated_zero", "ce_ablated_mean", "ce_recovered"):
    if name in result:
        row = result[name]
        between = "" if row["low"] is None else f"  [{row['low']:.4g}, {row['high']:.4g}]"
        print(f"{name:16} {row['value']:.4g}{between}")

# %% [markdown]
# `ce_recovered` is the share of the damage of having no activation at all (zero ablation) that the reconstruction
# avoids. Against the mean activation, a harder baseline, the share is smaller: both are in the result, and a paper that
# gives one number has chosen one.
#
# ## How often latents fire
#
# A healthy dictionary has a broad hump of frequencies; a heap on the left is dead or nearly so, one on the right fires
# on everything.

# %%
edges, counts = result.histogram["log10_edges"], result.histogram["latents"]
print(f"{'never':>18}  {result.histogram['never']:5d}")
for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
    if count:
        print(f"10^{low:5.2f} to 10^{high:5.2f}  {count:5d}  {'#' * round(60 * count / max(counts))}")

# %% [markdown]
# ## Where it goes wrong
#
# Positions, not averages: the tokens whose activation is reconstructed worst.

# %%
context = torch.from_numpy(shards.tokens(shards.contexts_of("evaluate")[:1])).long()
hook = coder.config.reads[0]
x = lm.capture(context, hook)[hook][0].float()
error = (x - coder(x).reconstruction).square().sum(-1) / x.square().sum(-1)
strings = lm.token_strings(context[0])
for place in error[1:].topk(8).indices.add(1).tolist():
    before = "".join(strings[max(0, place - 6) : place])
    print(f"{error[place]:.3f}  …{before!r} → {strings[place]!r}")

# %% [markdown]
# ## And the model's next tokens
#
# The same context with and without the splice: how often is the likeliest token the same?

# %%
with lm.bind(coder) as bound, torch.no_grad():
    spliced, plain = bound(context).logits, bound.raw(context)
same = (spliced.argmax(-1) == plain.argmax(-1)).float().mean()
print(f"same likeliest token at {same:.1%} of {context.shape[1]} positions")
