"""What attention over a paged cache has in common: tiles, and where the rows of a sequence lie.

Rules, in order:
1. KV lives in blocks: caches are [num_blocks, block_size, num_kv_heads, head_dim] views with any strides but a
   contiguous last dimension. Tiles are independent of the block size (16 to 256 and beyond).
2. One tile of queries holds all query heads of one KV head, at least 16 rows, so every product is a `tl.dot` and K and
   V are read once per group.
3. `context_lens` counts the whole context, the new tokens included; their K and V were written before the call.
4. Grids depend on shapes only, never on values on the device, so the launches can be captured in a CUDA graph. A row
   with context 0 (padding) gets zeros.
5. fp8 caches are dequantised in the tile load; their scales fold into the softmax scale and the output.

Never allocates KV, never looks at tokens, never synchronises with the host.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
MAX_INT32 = 2**31 - 1
MIN_ROWS = 16  # the smallest tile of a tensor-core product


@dataclass(frozen=True)
class Tile:
    """Sizes of one launch: rows of queries, columns of KV, warps and software-pipelining depth."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@triton.jit
def kv_offsets(
    p_table,
    o_n,
    m_n,
    start,
    stride_block,
    stride_slot,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_LARGE: tl.constexpr,
):
    """Element offsets [BLOCK_N] of the KV rows at positions `o_n` of one sequence."""
    if BLOCK_SIZE % BLOCK_N == 0:  # the tile lies inside one block: one load of the table
        blocks = tl.load(p_table + start // BLOCK_SIZE)
    else:
        blocks = tl.load(p_table + o_n // BLOCK_SIZE, mask=m_n, other=0)
    if IS_LARGE:  # 64-bit products per row cost registers and time; most pools do without
        blocks = blocks.to(tl.int64)
    return blocks * stride_block + (o_n % BLOCK_SIZE) * stride_slot


def is_large(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether offsets into these caches, counted in elements, need 64 bits."""
    return any(
        sum(s * (n - 1) for s, n in zip(c.stride(), c.shape, strict=True)) > MAX_INT32 for c in (k_cache, v_cache)
    )
