"""How far apart two results may be that are the same but for the order of their sums, from the arithmetic and not from
what one machine gave.

A sum whose terms are added in another order rounds differently: with another number of devices, threads or images per
batch, in another memory layout, or with other vector instructions (SSE, AVX2, AVX-512, NEON). Where a test can, it
computes in float64 (the fixture of that name), in which that is 1e-9 of what a wrong gradient changes, and uses DOUBLE. A
training by the command line is in float32, and uses `rounding`.

The tests of numbers are marked `numbers`: .ci/run repeats them as on machines with older vector instructions.
"""

from __future__ import annotations

import torch

# Relative, or absolute where values are around 1. A float64 has 53 bits: 2.2e-16 for each sum, of which a training here
# makes at most some 10,000 in a row (100 layers, forward and backward, 50 steps), and a factor of 1000 for optimizers such
# as Adam, which divide small differences by small numbers. A gradient that is wrong in its third digit is far beyond.
DOUBLE = 2e-9


def rounding(layers: int, steps: int = 0) -> float:
    """The relative difference that float32 may make in the loss of a network with so many layers of weights.

    Each layer's sums may end two units in the last place apart: vector units add in blocks, so that the error of a sum
    hardly grows with its number of terms. A forward pass goes through all layers, and each training step before it
    through all of them twice.
    """
    return 2 * torch.finfo(torch.float32).eps * layers * (1 + 2 * steps)
