"""Names of the stages, for help texts that must not load them."""

STAGE_NAMES = ("tokens", "activations", "train", "evaluate", "index", "explain", "score", "report")
