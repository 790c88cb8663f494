"""Which latents differ between two corpora, two models or two slices of one index: `unmix.index.diff`."""
