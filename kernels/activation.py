"""SiLU(gate) * up in Triton, for [rows, 2 * width] with the gate first. Float32 inside, one pass over memory."""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import let_next_start, overlap, wait_for_previous


@triton.jit
def _silu_mul_kernel(p_x, p_out, stride_x, stride_o, width, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < width
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    b_gate = tl.load(p_x + row * stride_x + o, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + row * stride_x + width + o, mask=m, other=0.0).to(tl.float32)
    b_out = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(p_out + row * stride_o + o, b_out.to(p_out.dtype.element_ty), mask=m)


def silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
    """out [rows, width] = silu(gate_up[:, :width]) * gate_up[:, width:]."""
    num_rows, width = out.shape
    block = min(2048, triton.next_power_of_2(width))
    _silu_mul_kernel[(num_rows, triton.cdiv(width, block))](
        gate_up, out, gate_up.stride(0), out.stride(0), width,
        BLOCK=block, num_warps=max(1, block // 256), **overlap(out),
    )  # fmt: skip
    return out
