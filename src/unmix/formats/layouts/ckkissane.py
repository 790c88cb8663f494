"""ckkissane's crosscoders of a base and a chat model: `cfg.json` + `cc_weights.pt`.

f = relu(Σ_m x_m W_enc[m] + b_enc), x̂_m = f W_dec[:, m] + b_dec[m], for the same hook of two models; nothing is
subtracted from the input. The coder reads both models' activations side by side, base first: its hooks are
`model_0:blocks.14.resid_pre` and `model_1:…`, which no single model resolves. The whole config is kept under
`training["ckkissane"]`.
"""

from __future__ import annotations

from unmix.formats.draft import Draft
from unmix.formats.equivalents import make_config
from unmix.formats.hook_names import from_transformer_lens
from unmix.formats.keymap import Stored, read_state
from unmix.formats.lazy import apply
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.settings import Settings

CONFIG = "cfg.json"
WEIGHTS = "cc_weights.pt"
_KEYMAP = (
    Stored("W_enc", "W_enc", ("models", "d_in", "dict_size")),
    Stored("b_enc", "b_enc", ("dict_size",)),
    Stored("W_dec", "W_dec", ("dict_size", "models", "d_in"), "join_hooks"),
    Stored("b_dec", "b_dec", ("models", "d_in")),
)
_IGNORED = (
    "seed", "batch_size", "buffer_mult", "lr", "num_tokens", "l1_coeff", "beta1", "beta2", "seq_len", "enc_dtype",
    "device", "model_batch_size", "log_every", "save_every", "dec_init_norm", "wandb_project", "wandb_entity", "site",
)  # fmt: skip


class CkkissaneFormat(Format):
    """`cfg.json` + `cc_weights.pt`."""

    name = "ckkissane"
    looks_for = f"{CONFIG} + {WEIGHTS} with W_enc [models, d, latents]"

    def recognise(self, place: Place) -> bool:
        """By its two files and the shape of the encoder."""
        if place.file not in (None, CONFIG, WEIGHTS) or not (place.folder / CONFIG).is_file():
            return False
        headers = place.headers(WEIGHTS)
        return set(headers) >= {"W_enc", "W_dec"} and len(headers["W_enc"].shape) == 3

    def read(self, place: Place, name: str = "") -> Draft:
        """See the module."""
        settings = Settings(place, CONFIG, place.json(CONFIG))
        sizes = {"d_in": settings.size("d_in"), "dict_size": settings.size("dict_size")}
        found = read_state(place, WEIGHTS, _KEYMAP, sizes, source=CONFIG)
        models = found.sizes["models"]
        hook = from_transformer_lens(settings.text("hook_point"))
        model = settings.text("model_name", default="")
        state = dict(found.state)
        state["W_enc"] = apply(lambda W: W.permute(2, 0, 1).flatten(1), state["W_enc"])
        state["b_dec"] = apply(lambda b: b.flatten(), state["b_dec"])
        tree = {
            "reads": tuple(f"model_{m}:{hook}" for m in range(models)),
            "d_in": sizes["d_in"] * models,
            "n_latents": sizes["dict_size"],
            "activation": {"kind": "relu"},
            "pre_bias": "none",
            "model": {"name": model} if model else None,
            "training": {self.name: settings.tree},
        }
        settings.ignore(*_IGNORED)
        settings.warn_unread()
        return Draft(make_config(tree, f"{place.shown}: {CONFIG}"), state)
