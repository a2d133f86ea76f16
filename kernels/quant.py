"""Weight-only quantised products in Triton: int8 or int4 weights with a scale per group of input columns.

Rules: symmetric, value = integer * scale; int4 pairs hold the even column in the low nibble, offset by 8. The integers
enter the product exactly (they fit the mantissa of half types) and each group's partial sum is scaled in float32, so
nothing is rounded that a full-precision product would keep. Small batches are cut along the depth too, so that the
processors are filled; the parts are added in a fixed order. Never changes a weight, never looks at values on the host.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DEPTH = 128


@dataclass(frozen=True)
class QuantWeight:
    """int8 [out, in], or for 4 bits uint8 [out, in / 2]; scales float16 [out, in / group_size]."""

    packed: Tensor
    scales: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight as it was."""
        return self.scales.shape[0], self.scales.shape[1] * self.group_size


@triton.jit(do_not_specialize=["num_rows"])
def _quant_kernel(
    p_x,
    p_w,
    p_scales,
    p_out,
    num_rows,
    stride_x,
    stride_w,
    stride_s,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_m = tl.program_id(1)
    i_split = tl.program_id(2)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < num_rows
    m_n = o_n < N
    p_x += o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    p_s = p_scales + o_n * stride_s
    PER_SPLIT: tl.constexpr = ((K // BLOCK_K + NUM_SPLITS - 1) // NUM_SPLITS) * BLOCK_K
    first = i_split * PER_SPLIT
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first, tl.minimum(first + PER_SPLIT, K), BLOCK_K):
        b_x = tl.load(p_x + k, mask=m_m[:, None], other=0.0)
        if BITS == 8:
            p_tile = p_w + o_n.to(tl.int64)[None, :] * stride_w + (k + o_k)[:, None]
            b_w = tl.load(p_tile, mask=m_n[None, :], other=0).to(b_x.dtype)
        else:
            o_half = tl.arange(0, BLOCK_K // 2)
            p_tile = p_w + o_n.to(tl.int64)[:, None] * stride_w + (k // 2 + o_half)[None, :]
            b_pair = tl.load(p_tile, mask=m_n[:, None], other=0).to(tl.int32)
            b_low = ((b_pair & 0xF) - 8).to(b_x.dtype)
            b_high = ((b_pair >> 4) - 8).to(b_x.dtype)
            b_w = tl.trans(tl.interleave(b_low, b_high))
        b_scale = tl.load(p_s + k // GROUP, mask=m_n, other=0.0).to(tl.float32)
        b_acc += tl.dot(b_x, b_w, input_precision="ieee") * b_scale[None, :]
    p_o = p_out + (i_split * num_rows + o_m).to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def quantise(weight: Tensor, bits: int, group_size: int = 128) -> QuantWeight:
    """Round a weight [out, in] to the nearest of 255 (8 bits) or 15 (4 bits) steps per group of input columns."""
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits are not possible; give 4 or 8")
    out, columns = weight.shape
    if group_size < 16 or group_size & (group_size - 1) or columns % group_size:
        raise ValueError(
            f"group size {group_size} must be a power of two of 16 or more that divides the {columns} input columns"
        )
    top = 127 if bits == 8 else 7
    groups = weight.float().view(out, -1, group_size)
    scales = (groups.abs().amax(dim=-1) / top).to(torch.float16)
    steps = scales.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]
    values = (groups / steps).round().clamp(-top, top).view(out, columns).to(torch.int8)
    if bits == 8:
        return QuantWeight(values, scales, bits, group_size)
    nibbles = (values + 8).to(torch.uint8).view(out, columns // 2, 2)
    return QuantWeight(nibbles[..., 0] | (nibbles[..., 1] << 4), scales, bits, group_size)


def largest_group(columns: int) -> int:
    """The largest group size that divides the input columns, at most `MAX_DEPTH`; the finest step the kernel takes."""
    return min(MAX_DEPTH, columns & -columns)


def linear(x: Tensor, weight: QuantWeight, num_splits: int | None = None) -> Tensor:
    """x [rows, in] times the weight: [rows, out] in x's dtype. `num_splits` cuts the depth; chosen when not given."""
    num_rows, columns = x.shape
    out_size, depth = weight.shape
    if columns != depth or x.stride(1) != 1:
        raise ValueError(f"rows of {columns} must be contiguous and as long as the weight's {depth} input columns")
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    block_n = 64 if block_m == 16 else 128
    block_k = min(MAX_DEPTH, weight.group_size)
    grid = (triton.cdiv(out_size, block_n), triton.cdiv(num_rows, block_m))
    if num_splits is None:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        num_splits = max(1, min(2 * processors // (grid[0] * grid[1]), depth // block_k // 4, 8))
    is_split = num_splits > 1
    out = x.new_empty(num_splits, num_rows, out_size, dtype=torch.float32 if is_split else x.dtype)
    _quant_kernel[(*grid, num_splits)](
        x, weight.packed, weight.scales, out, num_rows, x.stride(0), weight.packed.stride(0), weight.scales.stride(0),
        N=out_size, K=depth, BITS=weight.bits, GROUP=weight.group_size, NUM_SPLITS=num_splits,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3 if block_m == 64 else 4,
    )  # fmt: skip
    return out.sum(dim=0).to(x.dtype) if is_split else out[0]
