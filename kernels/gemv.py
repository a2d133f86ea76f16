"""Products of one row (or a few) with a weight, with what surrounds them in a decoder fused in: batch-1 decoding.

A step of one token reads every weight once and does almost nothing else, so its time is launches and bandwidth. These
kernels stream a weight once and take over the RMSNorm before a product, and the bias, residual addition or SiLU-mul
after it. The first weights are read before the wait for the previous kernel (`kernels.launch`).

Rules: weights are [out, in], rows contiguous. Sums are float32; the norm's scale is applied to the finished sum, and
nothing between input and output is rounded. A residual is added in place by the program that owns the column.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import let_next_start, overlap, wait_for_previous

MAX_ROWS = 4  # above, tensor cores and a library's product win
TILE = 4096  # weights of one step of a program
DEPTH = 512  # of them, neighbours in one row


@triton.jit
def _scaled(b_sum, b_squares, eps, K, HAS_NORM: tl.constexpr):
    """[rows, columns] finished sums, times the RMSNorm's scale of each row."""
    if HAS_NORM:
        b_scale = tl.rsqrt(tl.sum(b_squares, 1) / K + eps)
        b_sum = b_sum * b_scale[:, None]
    return b_sum


@triton.jit
def _gemv_kernel(
    p_x,
    p_norm,
    p_w,
    p_bias,
    p_out,
    eps,
    N,
    K,
    stride_x,
    stride_w,
    stride_o,
    NUM_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    ADDS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """BLOCK_N columns of the output for all rows. Gated: column n is silu(column n) * column N + n of the product."""
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < NUM_ROWS
    m_n = o_n < N
    p_gate = p_w + o_n.to(tl.int64)[:, None] * stride_w + o_k[None, :]
    p_up = p_gate + tl.cast(N, tl.int64) * stride_w
    p_x += o_m[:, None] * stride_x + o_k[None, :]
    m_w = m_n[:, None] & (o_k < K)[None, :]
    b_gate = tl.load(p_gate, mask=m_w, other=0.0, eviction_policy="evict_first")
    b_up = b_gate
    if IS_GATED:
        b_up = tl.load(p_up, mask=m_w, other=0.0, eviction_policy="evict_first")
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)

    b_sum = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    b_other = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    b_squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        following = k + BLOCK_K
        m_w = m_n[:, None] & (following + o_k < K)[None, :]
        b_next = tl.load(p_gate + following, mask=m_w, other=0.0, eviction_policy="evict_first")
        b_next_up = b_next
        if IS_GATED:
            b_next_up = tl.load(p_up + following, mask=m_w, other=0.0, eviction_policy="evict_first")
        m_x = m_m[:, None] if IS_EVEN else m_m[:, None] & (k + o_k < K)[None, :]
        b_x = tl.load(p_x + k, mask=m_x, other=0.0).to(tl.float32)
        if HAS_NORM:
            b_squares += b_x * b_x
            m_k = k + o_k < K
            b_x = b_x * tl.load(p_norm + k + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
        b_sum += b_x[:, None, :] * b_gate.to(tl.float32)[None, :, :]
        if IS_GATED:
            b_other += b_x[:, None, :] * b_up.to(tl.float32)[None, :, :]
        b_gate = b_next
        b_up = b_next_up

    b_y = _scaled(tl.sum(b_sum, 2), b_squares, eps, K, HAS_NORM)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        b_y = b_y / (1.0 + tl.exp(-b_y)) * _scaled(tl.sum(b_other, 2), b_squares, eps, K, HAS_NORM)
    p_o = p_out + o_m[:, None] * stride_o + o_n[None, :]
    m_o = m_m[:, None] & m_n[None, :]
    if ADDS:
        b_y = b_y.to(p_out.dtype.element_ty).to(tl.float32) + tl.load(p_o, mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_o, b_y.to(p_out.dtype.element_ty), mask=m_o)


@triton.jit
def _experts_up_kernel(
    p_x,
    p_norm,
    p_w,
    p_experts,
    p_out,
    eps,
    N,
    K,
    stride_x,
    stride_e,
    stride_w,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """BLOCK_N columns of silu(gate) * up of one (token, choice) pair, from the normalised token."""
    pair = tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    expert = tl.load(p_experts + pair).to(tl.int64)
    p_gate = p_w + expert * stride_e + o_n[:, None] * stride_w + o_k[None, :]
    p_x += (pair // TOP_K) * stride_x
    b_gate_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    b_up_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    b_squares = tl.zeros([BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        m_w = m_n[:, None] & m_k[None, :]
        b_gate = tl.load(p_gate + k, mask=m_w, other=0.0)
        b_up = tl.load(p_gate + N * stride_w + k, mask=m_w, other=0.0)
        b_x = tl.load(p_x + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_squares += b_x * b_x
        b_x = b_x * tl.load(p_norm + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_gate_sum += b_x[None, :] * b_gate.to(tl.float32)
        b_up_sum += b_x[None, :] * b_up.to(tl.float32)
    scale = tl.rsqrt(tl.sum(b_squares, 0) / K + eps)
    b_y = tl.sum(b_gate_sum, 1) * scale
    b_y = b_y / (1.0 + tl.exp(-b_y)) * tl.sum(b_up_sum, 1) * scale
    tl.store(p_out + pair.to(tl.int64) * N + o_n, b_y.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def _experts_down_kernel(
    p_inner,
    p_w,
    p_experts,
    p_weights,
    p_residual,
    N,
    K,
    stride_e,
    stride_w,
    stride_r,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """BLOCK_N columns of the weighted sum over one token's experts, added to its residual."""
    i_token = tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    b_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for choice in range(TOP_K):
        pair = i_token * TOP_K + choice
        expert = tl.load(p_experts + pair).to(tl.int64)
        weight = tl.load(p_weights + pair)
        p_tile = p_w + expert * stride_e + o_n[:, None] * stride_w + o_k[None, :]
        for k in range(0, K, BLOCK_K):
            m_k = k + o_k < K
            b_x = tl.load(p_inner + pair * K + k + o_k, mask=m_k, other=0.0).to(tl.float32) * weight
            b_w = tl.load(p_tile + k, mask=m_n[:, None] & m_k[None, :], other=0.0)
            b_sum += b_x[None, :] * b_w.to(tl.float32)
    p_o = p_residual + i_token * stride_r + o_n
    b_y = tl.sum(b_sum, 1).to(p_residual.dtype.element_ty).to(tl.float32)
    b_y += tl.load(p_o, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_o, b_y.to(p_residual.dtype.element_ty), mask=m_n)


def _fill_processors(x: Tensor, columns: int, block_n: int) -> int:
    """Fewer columns per program where a weight is so small that processors would stay without one."""
    wanted = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    while block_n > 2 and triton.cdiv(columns, block_n) < wanted - 8:
        block_n //= 2
    return block_n


def depth_block(depth: int, limit: int) -> int:
    """Columns of a step: the largest power of two that divides the depth, or a masked one when that is small."""
    divisor = depth & -depth
    return min(limit, divisor if divisor >= 256 else triton.next_power_of_2(depth))


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    is_gated: bool = False,
    adds: bool = False,
) -> Tensor:
    """out = f(norm(x) @ weight.T + bias) for x [rows, in] of at most MAX_ROWS rows.

    `norm` = (weight, eps) of an RMSNorm on x. Gated: weight [2 * out, in], f(gate, up) = silu(gate) * up. `adds` adds
    the product to what `out` holds instead of replacing it.
    """
    num_rows, depth = x.shape
    columns = out.shape[1]
    if num_rows > MAX_ROWS:
        raise ValueError(f"{num_rows} rows are more than {MAX_ROWS}; use a matrix product")
    block_m = triton.next_power_of_2(num_rows)
    block_k = depth_block(depth, DEPTH if block_m < 4 else DEPTH // 2)
    block_n = max(2, TILE // block_k // (2 if is_gated else 1))
    block_n = _fill_processors(x, columns, block_n)
    norm_weight, eps = norm or (x, 0.0)
    _gemv_kernel[(triton.cdiv(columns, block_n),)](
        x, norm_weight, weight, x if bias is None else bias, out, eps, columns, depth,
        x.stride(0), weight.stride(0), out.stride(0),
        NUM_ROWS=num_rows, HAS_NORM=norm is not None, HAS_BIAS=bias is not None, IS_GATED=is_gated, ADDS=adds,
        IS_EVEN=depth % block_k == 0, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, **overlap(x),
    )  # fmt: skip
    return out


def experts_mlp(
    residual: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    norm: tuple[Tensor, float],
) -> Tensor:
    """residual += the weighted sum over each token's experts of down(silu(gate) * up) of its norm, in two launches.

    residual [rows, hidden]; weights and experts [rows, top_k] as of `moe.route`. Reads an expert once per pair, so it
    suits few pairs.
    """
    num_tokens, top_k = experts.shape
    hidden, width = down.shape[1:]
    norm_weight, eps = norm
    inner = residual.new_empty(num_tokens * top_k, width)
    block_k = depth_block(hidden, 1024)
    up_n, down_n = (4, 8) if residual.is_cuda else (64, 64)
    _experts_up_kernel[(triton.cdiv(width, up_n), num_tokens * top_k)](
        residual, norm_weight, gate_up, experts, inner, eps, width, hidden,
        residual.stride(0), gate_up.stride(0), gate_up.stride(1),
        TOP_K=top_k, BLOCK_N=up_n, BLOCK_K=block_k, num_warps=4, **overlap(residual),
    )  # fmt: skip
    _experts_down_kernel[(triton.cdiv(hidden, down_n), num_tokens)](
        inner, down, experts, weights, residual, hidden, width, down.stride(0), down.stride(1), residual.stride(0),
        TOP_K=top_k, BLOCK_N=down_n, BLOCK_K=depth_block(width, 1024), num_warps=4, **overlap(residual),
    )  # fmt: skip
    return residual
