"""Prefill attention in Triton: chunks of any length over a cached prefix, causal; rules in `kernels.paged`.

Online softmax after FlashAttention-2 (arXiv:2307.08691). With blocks that hold whole tiles of keys the GPU's copy
engine fetches them by descriptor.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.paged import LOG2_E, Tile, is_large, kv_offsets


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["p_table", "p_lens", "p_starts"])
def _prefill_kernel(
    p_q,
    p_k,
    p_v,
    d_k,
    d_v,
    p_table,
    p_lens,
    p_starts,
    p_out,
    num_seqs,
    scale_log2,
    v_scale,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_table,
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_LARGE: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
):
    i_tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the tiles with the longest context start first
    i_kv = tl.program_id(0)
    low = 0
    high = num_seqs
    while high - low > 1:  # the last sequence whose first tile is at or before ours
        middle = (low + high) // 2
        first_tile = tl.load(p_starts + middle) // BLOCK_Q + middle
        low = tl.where(first_tile <= i_tile, middle, low)
        high = tl.where(first_tile <= i_tile, high, middle)
    i_seq = low
    begin = tl.load(p_starts + i_seq)
    query_len = tl.load(p_starts + i_seq + 1) - begin
    o_first = (i_tile - (begin // BLOCK_Q + i_seq)) * BLOCK_Q  # our first query token inside its sequence
    if o_first >= query_len:
        return
    seq_len = tl.load(p_lens + i_seq)
    prefix_len = seq_len - query_len

    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_q = o_first + o_m // GROUP
    head = i_kv * GROUP + o_m % GROUP
    m_m = (o_q < query_len) & (o_m < BLOCK_Q * GROUP)
    m_d = o_d < HEAD_DIM
    token = (begin + o_q).to(tl.int64)
    m_md = m_m[:, None] & m_d[None, :]
    b_q = tl.load(p_q + (token * stride_qt + head * stride_qh)[:, None] + o_d[None, :], mask=m_md, other=0.0)
    position = prefix_len + o_q
    p_table += i_seq.to(tl.int64) * stride_table
    p_k += i_kv * stride_kh
    p_v += i_kv * stride_vh

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full_end = (prefix_len + o_first + 1) // BLOCK_N * BLOCK_N  # tiles before it need no mask for any of our rows
    end = tl.minimum(prefix_len + o_first + BLOCK_Q, seq_len)
    for start in range(0, full_end, BLOCK_N):
        if HAS_DESCRIPTORS:
            row = tl.load(p_table + start // BLOCK_SIZE) * BLOCK_SIZE + start % BLOCK_SIZE
            b_k = tl.trans(d_k.load([row, i_kv * HEAD_DIM]))
            b_v = d_v.load([row, i_kv * HEAD_DIM])
        else:
            o_n = start + tl.arange(0, BLOCK_N)
            m_n = o_n < seq_len
            o_k = kv_offsets(p_table, o_n, m_n, start, stride_kb, stride_ks, BLOCK_SIZE, BLOCK_N, IS_LARGE)
            o_v = kv_offsets(p_table, o_n, m_n, start, stride_vb, stride_vs, BLOCK_SIZE, BLOCK_N, IS_LARGE)
            b_k = tl.load(p_k + o_k[None, :] + o_d[:, None], mask=m_d[:, None], other=0.0)
            b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee")
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
        b_old = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_acc = b_acc * b_old[:, None]
        b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), acc=b_acc, input_precision="ieee")
        b_max = b_new
    for start in range(full_end, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        if HAS_DESCRIPTORS:
            row = tl.load(p_table + start // BLOCK_SIZE) * BLOCK_SIZE + start % BLOCK_SIZE
            b_k = tl.trans(d_k.load([row, i_kv * HEAD_DIM]))
            b_v = tl.where(m_n[:, None], d_v.load([row, i_kv * HEAD_DIM]), 0.0)  # behind the context may lie anything
        else:
            o_k = kv_offsets(p_table, o_n, m_n, start, stride_kb, stride_ks, BLOCK_SIZE, BLOCK_N, IS_LARGE)
            o_v = kv_offsets(p_table, o_n, m_n, start, stride_vb, stride_vs, BLOCK_SIZE, BLOCK_N, IS_LARGE)
            b_k = tl.load(p_k + o_k[None, :] + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee") * scale_log2
        b_s = tl.where(o_n[None, :] <= position[:, None], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row that has seen nothing yet
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_old = tl.exp2(b_max - b_safe)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_acc = b_acc * b_old[:, None]
        b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), acc=b_acc, input_precision="ieee")
        b_max = b_new

    b_out = b_acc * (v_scale / tl.where(b_sum > 0, b_sum, 1.0))[:, None]
    p_o = p_out + (token * stride_ot + head * stride_oh)[:, None] + o_d[None, :]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=m_md)


def prefill_tile(group: int, head_dim: int, dtype: torch.dtype, has_descriptors: bool = False) -> Tile:
    """The tile used for prefill; measured on Hopper (benchmarks/kernels.py --tune)."""
    rows = max(128, triton.next_power_of_2(group))
    if dtype == torch.float32:  # three times the shared memory of bf16 tiles would not fit
        return Tile(max(32, triton.next_power_of_2(group)), 32, 4, 2)
    if head_dim > 128:
        return Tile(rows, 64, 8, 2)
    return Tile(rows, 64, 4, 3) if has_descriptors else Tile(rows, 128, 8, 3)


def _suits_descriptors(q: Tensor, cache: Tensor) -> bool:
    """Whether the GPU's copy engine can fetch tiles of this cache: rows at one distance, heads packed."""
    _, block_size, _, head_dim = cache.shape
    return (
        cache.dtype == q.dtype != torch.float32
        and head_dim in (64, 128, 256)
        and cache.stride(2) == head_dim
        and cache.stride(0) == block_size * cache.stride(1)
        and cache.data_ptr() % 16 == 0
    )


def _descriptor(cache: Tensor, rows: int) -> TensorDescriptor:
    """The cache as a matrix [blocks * block_size, kv_heads * head_dim], to be read in tiles of one head."""
    num_blocks, block_size, num_kv_heads, head_dim = cache.shape
    shape = [num_blocks * block_size, num_kv_heads * head_dim]
    return TensorDescriptor(cache, shape, [cache.stride(1), 1], [rows, head_dim])


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    out: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tile: Tile | None = None,
) -> Tensor:
    """Causal attention of chunks of any length, a decode token (length 1) included, in one launch.

    q, out [num_tokens, num_heads, head_dim] packed; query_starts int32 [num_seqs + 1] cumulative. A sequence's query
    tokens are the last of its context.
    """
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    num_seqs = query_starts.shape[0] - 1
    has_descriptors = block_size % 64 == 0 and _suits_descriptors(q, k_cache) and _suits_descriptors(q, v_cache)
    tile = tile or prefill_tile(group, head_dim, q.dtype, has_descriptors)
    has_descriptors = has_descriptors and block_size % tile.columns == 0
    d_k, d_v = (_descriptor(c, tile.columns) if has_descriptors else c for c in (k_cache, v_cache))
    block_q = tile.rows // group
    num_tiles = num_tokens // block_q + num_seqs  # an upper bound that needs no look at the device
    _prefill_kernel[(num_kv_heads, num_tiles)](
        q, k_cache, v_cache, d_k, d_v, block_tables, context_lens, query_starts, out, num_seqs,
        scale * LOG2_E * k_scale, v_scale,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), block_tables.stride(0), out.stride(0), out.stride(1),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=k_cache.shape[1], BLOCK_Q=block_q, BLOCK_M=tile.rows,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_N=tile.columns,
        IS_LARGE=is_large(k_cache, v_cache), HAS_DESCRIPTORS=has_descriptors,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
