"""Half-precision products on a CPU whose instructions know only float32 (AVX2).

There torch's bfloat16 product of many rows costs as much as that many products of one row. So the weight is widened to
float32 tile by tile, each tile small enough to stay in the second-level cache while it is multiplied. A widened value
is the same number and sums are in float32 either way: only the order of the sums differs. Memory holds half types only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 512  # of 64 to all: the fastest or within 7 % at 8 rows for widths 576 and 1536, one thread of a Zen 3
MIN_ROWS = 2  # with one row the product is bound by reading the weight, and widening does not pay


def is_half_slow() -> bool:
    """Whether this CPU multiplies half types only by converting them: torch's kernels for it are those of AVX2."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """x [rows, in] times weight [out, in], plus bias [out], in x's dtype; rounded once, from float32.

    With `scales` [out] float32 the weight may be of integers: each of its rows is multiplied with its scale.
    """
    wide = x.float()
    wide_bias = None if bias is None else bias.float()
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        tile_bias = None if wide_bias is None else wide_bias[tile]
        if scales is None:
            out[:, tile] = F.linear(wide, weight[tile].float(), tile_bias)
        else:
            product = F.linear(wide, weight[tile].float()).mul_(scales[tile])
            out[:, tile] = product if tile_bias is None else product.add_(tile_bias)
    return out
