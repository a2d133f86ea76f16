"""RMSNorm in Triton: plain, and fused with the residual addition before it. One program per row, float32 inside.

The sum is rounded to the activation's dtype before it is normalised, as the unfused model would do, so that fused and
unfused models agree bit for bit in the residual.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import let_next_start, overlap, wait_for_previous


@triton.jit
def _rms_norm_kernel(
    p_x,
    p_residual,
    p_weight,
    p_out,
    stride_x,
    stride_r,
    stride_o,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < width
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    b_x = tl.load(p_x + row * stride_x + o, mask=m, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_r = tl.load(p_residual + row * stride_r + o, mask=m, other=0.0).to(tl.float32)
        b_sum = (b_x + b_r).to(p_residual.dtype.element_ty)
        tl.store(p_residual + row * stride_r + o, b_sum, mask=m)
        b_x = b_sum.to(tl.float32)
    b_w = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / width + eps)
    tl.store(p_out + row * stride_o + o, (b_x * b_scale * b_w).to(p_out.dtype.element_ty), mask=m)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    num_rows, width = x.shape
    block = triton.next_power_of_2(width)
    other = x if residual is None else residual
    _rms_norm_kernel[(num_rows,)](
        x, other, weight, out, x.stride(0), other.stride(0), out.stride(0), width, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        **overlap(x),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """RMSNorm of x [rows, width] (rows may be strided) into out."""
    return _launch(x, None, weight, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """residual += x in place, then out = RMSNorm(residual); all [rows, width]."""
    return _launch(x, residual, weight, eps, out)
