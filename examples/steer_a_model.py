# %% [markdown]
# # Steer a model
#
# Turn one latent up while the model writes, and read what changes. The model is as it was downloaded; the coder's error
# is kept, so that nothing changes but the latent.

# %%
import os
from pathlib import Path

import unmix

RUN = Path(os.environ.get("UNMIX_RUN", "runs/demo"))
lm = unmix.load_model("builtin:smollm2")
coder = next(iter(unmix.load_all(RUN / "coders").values()))
index = unmix.open_index(RUN / "index")
latents = index[coder.name]

# %% [markdown]
# ## Choose a latent
#
# From the index: which latents fire on a word? For each its strongest tokens, so that one can be chosen by eye.

# %%
PROMPT = "The best thing about this place is"
WORD = " server"
(token,) = lm.tokenizer.encode(WORD, add_special_tokens=False)
hits = latents.search_token(token)[:6]
for hit in hits:
    words = [t.string for t in latents[hit.latent].top_tokens(5)]
    print(f"{hit.latent:5d}  fires on {latents.frequency[hit.latent]:.2%}  {words}")

# %% [markdown]
# ## Before and after
#
# `Set` at generated positions, in the units of the latent: a few times the largest value it takes by itself.

# %%
latent = hits[0].latent
largest = float(latents.max[latent])
with lm.bind(coder, error="keep") as bound:
    print("as it is :", bound.generate(PROMPT, 24))
    for factor in (1.0, 2.0, 4.0):
        act = unmix.Set(latent=latent, value=factor * largest, where="generated")
        print(f"{factor:.0f} x max  :", bound.generate(PROMPT, 24, interventions=[act]))

# %% [markdown]
# ## How strong is strong?
#
# Values mean different things for different latents. Ask instead for a distance: the strength at which the model's next
# tokens are a given KL away from its own, along the latent's decoder direction.

# %%
with lm.bind(coder, error="keep") as bound:
    for target in (0.05, 0.5):
        found = bound.steer_to_kl(PROMPT, [unmix.Steer(latent=latent)], target=target)
        print(f"KL {found.kl:.3f} at strength {found.strength:.1f}:")
        print("   ", bound.generate(PROMPT, 24, interventions=found.interventions))

# %% [markdown]
# ## The other way
#
# Ablation: where the prompt makes latents fire, take the strongest away and see what the model would have said.

# %%
with lm.bind(coder, error="keep") as bound:
    codes = bound(PROMPT).codes[coder.name]
    ids, values = codes.row(codes.rows - 1)
    strongest = ids[values.topk(3).indices].tolist()
    print("strongest at the last token:", strongest)
    print("without them:", bound.generate(PROMPT, 24, interventions=[unmix.Ablate(latent=strongest)]))
