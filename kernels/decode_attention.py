"""Split-KV decode attention in Triton: one query token per sequence over its paged context; rules in `kernels.paged`.

Contexts are cut into pieces while the batch is small, and a second kernel joins them, after Flash-Decoding (Dao et al.
2023).
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
from kernels.paged import LOG2_E, MIN_ROWS, Tile, is_large, kv_offsets


@triton.jit(do_not_specialize_on_alignment=["p_table", "p_lens"])
def _decode_kernel(
    p_q,
    p_k,
    p_v,
    p_table,
    p_lens,
    p_out,
    p_partial,
    p_lse,
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
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_LARGE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    i_kv = tl.program_id(0)
    i_seq = tl.program_id(1)
    i_split = tl.program_id(2)
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    seq_len = tl.load(p_lens + i_seq)
    num_tiles = tl.cdiv(seq_len, BLOCK_N)
    tiles_per_split = tl.cdiv(num_tiles, NUM_SPLITS)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)

    o_h = tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_h = o_h < GROUP
    m_d = o_d < HEAD_DIM
    heads = i_kv * GROUP + o_h
    p_q += i_seq.to(tl.int64) * stride_qt
    b_q = tl.load(p_q + heads[:, None] * stride_qh + o_d[None, :], mask=m_h[:, None] & m_d[None, :], other=0.0)
    p_table += i_seq.to(tl.int64) * stride_table
    p_k += i_kv * stride_kh
    p_v += i_kv * stride_vh

    b_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_H], tl.float32)
    b_acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for tile in range(first, last):
        start = tile * BLOCK_N
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < seq_len
        o_k = kv_offsets(p_table, o_n, m_n, start, stride_kb, stride_ks, BLOCK_SIZE, BLOCK_N, IS_LARGE)
        o_v = kv_offsets(p_table, o_n, m_n, start, stride_vb, stride_vs, BLOCK_SIZE, BLOCK_N, IS_LARGE)
        b_k = tl.load(p_k + o_k[None, :] + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v + o_v[:, None] + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee") * scale_log2
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_old = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_acc = b_acc * b_old[:, None]
        b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), acc=b_acc, input_precision="ieee")
        b_max = b_new

    m_o = m_h[:, None] & m_d[None, :]
    if NUM_SPLITS == 1:
        b_out = b_acc * (v_scale / tl.where(b_sum > 0, b_sum, 1.0))[:, None]
        p_o = p_out + i_seq.to(tl.int64) * stride_ot + heads[:, None] * stride_oh + o_d[None, :]
        tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=m_o)
    else:
        b_part = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        row = (i_seq.to(tl.int64) * NUM_HEADS + heads) * NUM_SPLITS + i_split
        tl.store(p_partial + row[:, None] * HEAD_DIM + o_d[None, :], b_part, mask=m_o)
        b_lse = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
        tl.store(p_lse + row, b_lse, mask=m_h)


@triton.jit(do_not_specialize_on_alignment=["p_lens"])
def _reduce_kernel(
    p_partial,
    p_lse,
    p_lens,
    p_out,
    v_scale,
    stride_ot,
    stride_oh,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    i_head = tl.program_id(0)
    i_seq = tl.program_id(1)
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    row = (i_seq.to(tl.int64) * NUM_HEADS + i_head) * NUM_SPLITS
    b_lse = tl.load(p_lse + row + o_s, mask=o_s < NUM_SPLITS, other=float("-inf"))
    b_top = tl.max(b_lse, 0)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)  # an empty context: all weights become 0
    b_w = tl.exp2(b_lse - b_top)
    m_s = b_lse != float("-inf")
    b_part = tl.load(
        p_partial + (row + o_s)[:, None] * HEAD_DIM + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0
    )
    total = tl.sum(b_w, 0)
    b_out = tl.sum(b_part * b_w[:, None], 0) * (v_scale / tl.where(total > 0, total, 1.0))
    tl.store(
        p_out + i_seq.to(tl.int64) * stride_ot + i_head * stride_oh + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d
    )


@dataclass(frozen=True)
class SplitWorkspace:
    """Scratch of the split decode: partial outputs and their log-sum-exp, reused by every layer."""

    partial: Tensor  # float32 [max_rows, num_heads, max_splits, head_dim]
    lse: Tensor  # float32 [max_rows, num_heads, max_splits]

    @classmethod
    def allocate(
        cls, max_rows: int, num_heads: int, head_dim: int, max_splits: int, device: torch.device
    ) -> SplitWorkspace:
        """Space for `max_rows` sequences of `max_splits` splits each."""
        shape = (max_rows, num_heads, max_splits)
        return cls(
            torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )


def decode_tile(group: int, head_dim: int) -> Tile:
    """The tile used for decode; measured on Hopper (benchmarks/kernels.py --tune)."""
    return Tile(max(MIN_ROWS, triton.next_power_of_2(group)), 32, 2 if head_dim <= 128 else 4, 4)


def num_splits_for(num_rows: int, num_kv_heads: int, max_context: int, num_processors: int) -> int:
    """How many pieces each context is cut into so that small batches still fill the processors.

    Depends on bounds only, never on the lengths on the device, so that a captured graph stays valid.
    """
    programs = num_rows * num_kv_heads
    wanted = -(-3 * num_processors // programs)
    most = max(1, -(-max_context // 128))
    return triton.next_power_of_2(max(1, min(wanted, most, 64)))


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
    num_splits: int = 1,
    workspace: SplitWorkspace | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    tile: Tile | None = None,
) -> Tensor:
    """Attention of one query token per sequence.

    q, out [num_seqs, num_heads, head_dim]; caches as the module says; block_tables int32 [num_seqs, max_blocks];
    context_lens int32 [num_seqs]. With `num_splits` > 1 a workspace of at least that size is needed.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    tile = tile or decode_tile(group, head_dim)
    partial, lse = out, out
    if num_splits > 1:
        if workspace is None or workspace.lse.numel() < num_seqs * num_heads * num_splits:
            raise ValueError(f"{num_splits} splits of {num_seqs} rows need a larger SplitWorkspace")
        partial, lse = workspace.partial, workspace.lse
    _decode_kernel[(num_kv_heads, num_seqs, num_splits)](
        q, k_cache, v_cache, block_tables, context_lens, out, partial, lse, scale * LOG2_E * k_scale, v_scale,
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), block_tables.stride(0), out.stride(0), out.stride(1),
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=k_cache.shape[1], NUM_SPLITS=num_splits,
        BLOCK_H=tile.rows, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_N=tile.columns,
        IS_LARGE=is_large(k_cache, v_cache),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **overlap(q),
    )  # fmt: skip
    if num_splits > 1:
        _reduce_kernel[(num_heads, num_seqs)](
            partial, lse, context_lens, out, v_scale, out.stride(0), out.stride(1),
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, NUM_SPLITS=num_splits, BLOCK_S=triton.next_power_of_2(num_splits),
            BLOCK_D=triton.next_power_of_2(head_dim), num_warps=2 if num_splits <= 16 else 4,
            **overlap(q),
        )  # fmt: skip
    return out
