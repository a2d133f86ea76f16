"""Noise that is a function of (seed, draw, column) alone: the same on every device, in any batch, after any preemption.

Philox 4x32 with seven rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; seven pass BigCrush).
Key: the seed's two halves. Counter: (j, draw, 0, 0). Its four words belong to columns j, Q + j, 2 Q + j and 3 Q + j,
where Q is a quarter of the columns, rounded up. `sampling` computes the same in Triton.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_ROUNDS = 7
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
TINY = 2.0**-10  # below it -log(1 - u) is its series: 1 - u would lose u's bits
UNIT = 2.0**-32


def gumbel(seed: int, draw: int, num_columns: int) -> Tensor:
    """Gumbel noise float32 [num_columns] of draw number `draw` (>= 0) with `seed` (0 to 2**63 - 1)."""
    u = (philox(seed, draw, num_columns).astype(np.float32) + np.float32(0.5)) * np.float32(UNIT)
    u = np.minimum(u, np.float32(1 - 2.0**-24))
    series = u * (1 + u * (np.float32(0.5) + u * np.float32(1 / 3)))
    exponential = np.where(u < TINY, series, -np.log(1 - u))
    return torch.from_numpy(-np.log(exponential))


def philox(seed: int, draw: int, num_columns: int) -> NDArray[np.uint32]:
    """The random words [num_columns]."""
    quarter = -(-num_columns // 4)
    c0 = np.arange(quarter, dtype=np.uint64)
    c1, c2, c3 = np.full_like(c0, draw & 0xFFFFFFFF), np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(NUM_ROUNDS):
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1 = (second >> _HALF) ^ c1 ^ np.uint64(k0), second & _LOW
        c2, c3 = (first >> _HALF) ^ c3 ^ np.uint64(k1), first & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.concatenate((c0, c1, c2, c3))[:num_columns].astype(np.uint32)
