"""Mixture of experts in Triton: routing, grouping of tokens by expert, and a product per expert in one launch.

Rules, in order:
1. A pair is (token, choice), numbered token * top_k + choice. A counting sort by expert keeps the order of
   pairs, so results do not depend on timing.
2. Grids depend on shapes only: a product has `num_pairs // rows + num_experts` tiles, which is enough however the pairs
   fall, and tiles that turn out empty leave at once. So the launches can be captured in a CUDA graph.
3. Products accumulate in float32; the router's weight is applied before the rounding, the sum over choices after it.

Never allocates weights, never looks at the routing on the host. No token is ever dropped.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import let_next_start, overlap, wait_for_previous

GROUP_BLOCK = 2048  # pairs that one step of the counting sort looks at


@dataclass(frozen=True)
class ProductTile:
    """Sizes of one tile of the grouped product: rows of pairs, output columns, depth."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@triton.jit
def _route_kernel(
    p_logits,
    p_weights,
    p_experts,
    stride,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    o_k = tl.arange(0, BLOCK_K)
    m_e = o_e < NUM_EXPERTS
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    b_logits = tl.load(p_logits + i_token * stride + o_e, mask=m_e, other=float("-inf")).to(tl.float32)
    b_left = tl.exp(b_logits - tl.max(b_logits, 0))
    b_left = tl.where(m_e, b_left / tl.sum(b_left, 0), -1.0)
    b_weights = tl.zeros([BLOCK_K], tl.float32)
    b_experts = tl.zeros([BLOCK_K], tl.int32)
    for k in range(TOP_K):
        best = tl.argmax(b_left, 0)
        b_weights = tl.where(o_k == k, tl.max(b_left, 0), b_weights)
        b_experts = tl.where(o_k == k, best, b_experts)
        b_left = tl.where(o_e == best, -1.0, b_left)
    if IS_RENORMALISED:
        b_weights = b_weights / tl.sum(b_weights, 0)
    tl.store(p_weights + i_token * TOP_K + o_k, b_weights, mask=o_k < TOP_K)
    tl.store(p_experts + i_token * TOP_K + o_k, b_experts, mask=o_k < TOP_K)


@triton.jit(do_not_specialize=["num_pairs"])
def _group_kernel(p_experts, p_order, p_starts, num_pairs, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """One expert: where its pairs begin, and which they are. The program after the last expert writes the end."""
    expert = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    b_less = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        b_e = tl.load(p_experts + start + o, mask=start + o < num_pairs, other=NUM_EXPERTS + 1)
        b_less += (b_e < expert).to(tl.int32)
    position = tl.sum(b_less, 0)
    tl.store(p_starts + expert, position)
    for start in range(0, num_pairs, BLOCK):
        b_e = tl.load(p_experts + start + o, mask=start + o < num_pairs, other=NUM_EXPERTS + 1)
        b_same = (b_e == expert).to(tl.int32)
        b_rank = tl.cumsum(b_same, 0) - b_same
        tl.store(p_order + position + b_rank, start + o, mask=b_same > 0)
        position += tl.sum(b_same, 0)


@triton.jit
def _product_kernel(
    p_x,
    p_w,
    p_order,
    p_starts,
    p_scales,
    p_out,
    stride_x,
    stride_we,
    stride_wn,
    stride_o,
    NUM_EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first product reads tokens and writes sorted rows of silu(gate) * up, the gate's columns before the up's; the
    second reads sorted rows and writes scaled pairs."""
    i_n = tl.program_id(0)
    i_tile = tl.program_id(1)
    low = 0
    high = NUM_EXPERTS
    while high - low > 1:  # the last expert whose first tile is at or before ours
        middle = (low + high) // 2
        first_tile = tl.load(p_starts + middle) // BLOCK_M + middle
        low = tl.where(first_tile <= i_tile, middle, low)
        high = tl.where(first_tile <= i_tile, high, middle)
    begin = tl.load(p_starts + low)
    count = tl.load(p_starts + low + 1) - begin
    first = (i_tile - (begin // BLOCK_M + low)) * BLOCK_M
    if first >= count:
        return
    o_m = first + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < count
    m_n = o_n < N
    rows = (begin + o_m).to(tl.int64)
    pairs = tl.load(p_order + rows, mask=m_m, other=0).to(tl.int64)
    sources = rows
    targets = pairs
    if IS_FIRST:
        sources = pairs // TOP_K
        targets = rows
    p_a = p_x + sources[:, None] * stride_x + o_k[None, :]
    p_b = p_w + tl.cast(low, tl.int64) * stride_we + o_n[None, :] * stride_wn + o_k[:, None]
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_a = m_m[:, None]
        m_b = m_n[None, :]
        if K % BLOCK_K != 0:
            m_a = m_a & (k + o_k < K)[None, :]
            m_b = m_b & (k + o_k < K)[:, None]
        b_a = tl.load(p_a + k, mask=m_a, other=0.0)
        b_b = tl.load(p_b + k, mask=m_b, other=0.0)
        if IS_FIRST:
            b_up = tl.load(p_b + N * stride_wn + k, mask=m_b, other=0.0)
        b_acc = tl.dot(b_a, b_b, acc=b_acc, input_precision="ieee")
        if IS_FIRST:
            b_acc_up = tl.dot(b_a, b_up, acc=b_acc_up, input_precision="ieee")
    if IS_FIRST:
        b_acc = b_acc / (1.0 + tl.exp(-b_acc)) * b_acc_up
    else:
        b_acc = b_acc * tl.load(p_scales + pairs, mask=m_m, other=0.0)[:, None]
    p_o = p_out + targets[:, None] * stride_o + o_n[None, :]
    tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def product_tile(num_pairs: int, num_experts: int) -> ProductTile:
    """The tile for pairs spread evenly: few rows and deep steps while weights are what is read, large ones after."""
    rows = min(128, max(16, triton.next_power_of_2(num_pairs // num_experts)))
    if rows <= 32:
        return ProductTile(rows, 64, 128, 4, 4)
    return ProductTile(rows, 128, 64, 4 if rows == 64 else 8, 3)


def route(logits: Tensor, top_k: int, is_renormalised: bool) -> tuple[Tensor, Tensor]:
    """(weights float32, experts int32), both [num_tokens, top_k], of router logits [num_tokens, num_experts].

    Softmax over all experts, then the largest; of equal ones the first. Renormalised weights sum to one.
    """
    num_tokens, num_experts = logits.shape
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top_k {top_k} must be between 1 and the {num_experts} experts")
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    _route_kernel[(num_tokens,)](
        logits, weights, experts, logits.stride(0), NUM_EXPERTS=num_experts, TOP_K=top_k,
        IS_RENORMALISED=is_renormalised, BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k), num_warps=1 if num_experts <= 256 else 4,
        **overlap(logits),
    )  # fmt: skip
    return weights, experts


def group(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order int32 [num_pairs], starts int32 [num_experts + 1]): the pairs sorted by expert, and where each begins."""
    num_pairs = experts.numel()
    order = torch.empty(num_pairs, dtype=torch.int32, device=experts.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    block = min(GROUP_BLOCK, max(16, triton.next_power_of_2(num_pairs)))
    _group_kernel[(num_experts + 1,)](
        experts, order, starts, num_pairs, NUM_EXPERTS=num_experts, BLOCK=block, num_warps=4
    )
    return order, starts


def experts_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, tile: ProductTile | None = None
) -> Tensor:
    """Sum over each token's choices of weight * down(silu(gate) * up).

    x [tokens, hidden], gate_up [experts, 2 * width, hidden], down [experts, hidden, width]; the routing as of `route`.
    """
    num_tokens, top_k = experts.shape
    num_experts, hidden, width = down.shape
    num_pairs = num_tokens * top_k
    tile = tile or product_tile(num_pairs, num_experts)
    order, starts = group(experts, num_experts)
    num_tiles = num_pairs // tile.rows + num_experts

    def product(source: Tensor, w: Tensor, out: Tensor, is_first: bool) -> Tensor:
        columns = tile.columns // 2 if is_first else tile.columns  # the first product computes two outputs of a column
        _product_kernel[(triton.cdiv(out.shape[1], columns), num_tiles)](
            source, w, order, starts, weights, out, source.stride(0), w.stride(0), w.stride(1), out.stride(0),
            NUM_EXPERTS=num_experts, N=out.shape[1], K=w.shape[2], TOP_K=top_k, IS_FIRST=is_first,
            BLOCK_M=tile.rows, BLOCK_N=columns, BLOCK_K=tile.depth,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return out

    inner = product(x, gate_up, x.new_empty(num_pairs, width), is_first=True)
    pairs = product(inner, down, x.new_empty(num_pairs, hidden), is_first=False)
    return pairs.view(num_tokens, top_k, hidden).sum(dim=1)
