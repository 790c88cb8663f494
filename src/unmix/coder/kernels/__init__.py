"""Kernels for cards (Triton): scoring fused with selection, sparse decode, one latent-major backward pass.

    encode.top_codes, encode.threshold_codes   exact codes; never a [tokens, latents] tensor
    decode.decode, decode.residual             weighted sums of decoder rows
    gradients.latent_gradients                 every sum over a latent's tokens, and Adam's step at its end
    fused.fused_topk, fused.fused_topk_step    all of it behind autograd, or as a whole training step
    plain                                      the same in torch's own operations, on any device
    dispatch                                   the doors for `unmix.coder.sparse`

Nothing here has been measured on a card. What follows is arithmetic, at the 790 TFLOP/s (bfloat16) and 4 TB/s seen of
an H200; `python -m benchmarks.gpu --model` computes it, `python -m benchmarks.gpu` measures it. Milliseconds:

    d, F, k, tokens                 768, 24k, 32, 8k   2304, 65k, 64, 8k   4096, 131k, 64, 8k   4096, 131k, 64, 32k
    product [tokens, d] × [d, F]          0.39                3.13               11.1                 44.5
    its dense result, written and read    0.20                0.54                1.1                  4.3
    scores of the sample (1 in 32)        0.01                0.10                0.35                 1.4
    candidates, written and read          0.01                0.01                0.01                 0.03
    decode, rows gathered                 0.10                0.60                1.1                  4.3
    backward, rows gathered               0.20                1.2                 2.1                  8.6
    both weight gradients written         0.04                0.30                1.1                  1.1
    Adam in the pass (26 B a weight)      0.25                1.96                7.0                  7.0

Gathered rows count as if they came from memory. What is gathered backwards, inputs and gradients of 8k tokens (13 to 67
MB each in bfloat16), partly fits a level-2 cache of 50 to 60 MB, whose bandwidth is higher; decoder rows do not.

Choices behind it:
- One product. Two passes, group maxima first and candidates second as on the CPU, would pay the product twice. A sample
  of the latents costs 3 % and gives every token a floor; a floor that was wrong shows in the count of candidates, and
  costs that token the plain path. A floor that learns from the batch before would save the 3 %.
- The epilogue is the danger: 2,048 multiply-adds a cycle on tensor cores leave d / 16 instructions of all 128 lanes for
  each score, 48 at d 768. About ten are spent on one that is no candidate (read off the machine code), half by half of
  a tile so that two programs fit a multiprocessor and one's epilogue can hide behind the other's product. Counts of a
  token come from atomics that nothing waits for one by one: in turn, sixteen hits a warp would take 10 µs a tile.
- Candidates arrive in any order; the choice among them is by (value, id) and does not depend on it. No other atomics.
- A latent's decoder row, both gradient sums and a few tokens' rows are in registers at once, so each token's gradient
  row is read once for dL/dz and dL/dW_dec. Rows are padded to powers of two: at d 2304, 44 % of the lanes idle.
"""
