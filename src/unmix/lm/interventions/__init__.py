"""What can be done to latents and activations while a model runs: at which places, by which rule, in which order."""
