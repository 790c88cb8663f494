"""Fixtures of OpenAI's sparse_autoencoder, by its own code.

`python make_openai.py CHECKOUT`, where CHECKOUT is the peer's repository at 4965b94.
"""

from __future__ import annotations

import sys

from recording import D, F, fill, inputs, record, start, stub

CHECKOUT = sys.argv[1]
sys.path.insert(0, CHECKOUT)
stub("blobfile")

import torch  # noqa: E402
from sparse_autoencoder.model import Autoencoder, TopK  # noqa: E402
from torch import nn  # noqa: E402

COMMIT = "4965b941e9eb590b00b253a2c406db1e1b193942"
KINDS = {
    "relu_v1": ("mlp_post_act", nn.ReLU(), False),
    "relu_v4": ("resid_delta_mlp_v4", nn.ReLU(), True),
    "topk_v5": ("resid_post_mlp_v5_32k", TopK(12), True),
    "topk_signed": ("resid_post_attn_v5_128k", TopK(12, nn.Identity()), True),
}

for kind, (location, activation, says) in KINDS.items():
    layered = isinstance(activation, TopK)
    coder = Autoencoder(F, D, activation=activation, normalize=layered).eval()
    fill(coder, seed=3)
    with torch.no_grad():
        coder.latent_bias.sub_(1.2)  # some rows have fewer positive latents than k
        coder.latents_activation_frequency.copy_(torch.linspace(0, 1, F))
        coder.latents_mean_square.copy_(torch.linspace(0, 2, F))
        coder.stats_last_nonzero.copy_(torch.arange(F))
    state = coder.state_dict()
    for key in ("activation.k", "activation.postact_fn"):  # its own loader refuses what its own state holds twice
        state.pop(key, None)
    if not says:  # the first files were saved before the activation was
        del state["activation"], state["activation_state_dict"]
    folder = start("openai", kind)
    place = f"gpt2-small/{location}/autoencoders/8.pt"
    (folder / place).parent.mkdir(parents=True)
    torch.save(state, folder / place)
    again = Autoencoder.from_state_dict(torch.load(folder / place, weights_only=True))
    x = inputs()
    with torch.no_grad():
        acts, info = again.encode(x)
        recon = again.decode(acts, info)
    if layered:
        assert ((acts > 0).sum(-1) < 12).any()
    record(folder, {"x": x, "acts": acts, "recon": recon}, "sparse_autoencoder", COMMIT,
           [{"place": place, "name": "", "prefix": ""}])  # fmt: skip
