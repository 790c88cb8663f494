"""Training on several devices: a mesh of data × dictionary, with the result of one process.

Ranks of one data row see the same tokens and hold one slice of the latents each; ranks of one column hold the same
slice and see different tokens. Between shards go the gates of k candidates a token and partial reconstructions, never
pre-activations.
"""
