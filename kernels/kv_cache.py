"""What happens to KV outside attention: rotary + write in one launch, and moving whole blocks in and out of the pool.

Rules: a slot is block * block_size + offset; a negative slot is padding and writes nothing. Queries are rotated in
place, keys only on their way into the cache. Blocks leave packed, contiguous and in the order asked for, as they are,
as fp8 (e4m3) or as int4 with a float16 scale per token and head, and come back the same way. Never allocates blocks.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import let_next_start, overlap, wait_for_previous

PACK_ROWS = 32  # heads of one token that one program packs
ROTARY_HEADS = 16  # query heads that one program rotates, at least one KV head's


@triton.jit
def _head_norm(b_low, b_high, p_weight, o, m, eps, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """RMSNorm of every head of a tile, rounded as the unfused model rounds it by the caller."""
    b_scale = tl.rsqrt((tl.sum(b_low * b_low, 1) + tl.sum(b_high * b_high, 1)) / HEAD_DIM + eps)
    b_w_low = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    b_w_high = tl.load(p_weight + HALF + o, mask=m, other=0.0).to(tl.float32)
    return b_low * b_scale[:, None] * b_w_low[None, :], b_high * b_scale[:, None] * b_w_high[None, :]


@triton.jit(do_not_specialize_on_alignment=["p_positions", "p_slots"])
def _rotary_write_kernel(
    p_qkv,
    p_positions,
    p_slots,
    p_cos_sin,
    p_q_norm,
    p_k_norm,
    p_q_out,
    p_k,
    p_v,
    eps,
    inv_k_scale,
    inv_v_scale,
    stride_t,
    stride_cs,
    stride_qt,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KV_PER_PROGRAM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One token and KV_PER_PROGRAM of its KV heads with all their query heads."""
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    o = tl.arange(0, BLOCK_HALF)
    m = o < HALF
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    p_in = p_qkv + i_token * stride_t
    p_table = p_cos_sin + tl.load(p_positions + i_token).to(tl.int64) * stride_cs
    b_cos = tl.load(p_table + o, mask=m, other=0.0).to(tl.float32)[None, :]
    b_sin = tl.load(p_table + HALF + o, mask=m, other=0.0).to(tl.float32)[None, :]

    o_q = tl.arange(0, BLOCK_Q)
    heads = i_part * KV_PER_PROGRAM * GROUP + o_q
    m_q = ((o_q < KV_PER_PROGRAM * GROUP) & (heads < NUM_HEADS))[:, None] & m[None, :]
    o_in = heads[:, None] * HEAD_DIM + o[None, :]
    b_low = tl.load(p_in + o_in, mask=m_q, other=0.0).to(tl.float32)
    b_high = tl.load(p_in + HALF + o_in, mask=m_q, other=0.0).to(tl.float32)
    if HAS_NORM:
        b_low, b_high = _head_norm(b_low, b_high, p_q_norm, o, m, eps, HEAD_DIM, HALF)
        b_low = b_low.to(p_qkv.dtype.element_ty).to(tl.float32)
        b_high = b_high.to(p_qkv.dtype.element_ty).to(tl.float32)
    p_o = p_q_out + i_token * stride_qt + o_in
    tl.store(p_o, (b_low * b_cos - b_high * b_sin).to(p_q_out.dtype.element_ty), mask=m_q)
    tl.store(p_o + HALF, (b_high * b_cos + b_low * b_sin).to(p_q_out.dtype.element_ty), mask=m_q)

    slot = tl.load(p_slots + i_token).to(tl.int64)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    o_kv = tl.arange(0, BLOCK_KV)
    kv_heads = i_part * KV_PER_PROGRAM + o_kv
    # a vector condition on the slot: the interpreter takes no scalar one
    m_slot = (o_kv < KV_PER_PROGRAM) & (kv_heads < NUM_KV_HEADS) & (slot + o_kv * 0 >= 0)
    m_kv = m_slot[:, None] & m[None, :]
    o_key = (NUM_HEADS + kv_heads)[:, None] * HEAD_DIM + o[None, :]
    b_low = tl.load(p_in + o_key, mask=m_kv, other=0.0).to(tl.float32)
    b_high = tl.load(p_in + HALF + o_key, mask=m_kv, other=0.0).to(tl.float32)
    if HAS_NORM:
        b_low, b_high = _head_norm(b_low, b_high, p_k_norm, o, m, eps, HEAD_DIM, HALF)
        b_low = b_low.to(p_qkv.dtype.element_ty).to(tl.float32)
        b_high = b_high.to(p_qkv.dtype.element_ty).to(tl.float32)
    p_c = p_k + block * stride_kb + offset * stride_ks + kv_heads[:, None] * stride_kh + o[None, :]
    tl.store(p_c, ((b_low * b_cos - b_high * b_sin) * inv_k_scale).to(p_k.dtype.element_ty), mask=m_kv)
    tl.store(p_c + HALF, ((b_high * b_cos + b_low * b_sin) * inv_k_scale).to(p_k.dtype.element_ty), mask=m_kv)
    o_value = o_key + NUM_KV_HEADS * HEAD_DIM
    b_low = tl.load(p_in + o_value, mask=m_kv, other=0.0).to(tl.float32)
    b_high = tl.load(p_in + HALF + o_value, mask=m_kv, other=0.0).to(tl.float32)
    p_c = p_v + block * stride_vb + offset * stride_vs + kv_heads[:, None] * stride_vh + o[None, :]
    tl.store(p_c, (b_low * inv_v_scale).to(p_v.dtype.element_ty), mask=m_kv)
    tl.store(p_c + HALF, (b_high * inv_v_scale).to(p_v.dtype.element_ty), mask=m_kv)


@triton.jit(do_not_specialize_on_alignment=["p_from_ids", "p_to_ids"])
def _copy_blocks_kernel(p_from, p_to, p_from_ids, p_to_ids, stride_from, stride_to, size, BLOCK: tl.constexpr):
    i_block = tl.program_id(0)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    source = tl.load(p_from_ids + i_block).to(tl.int64)
    target = tl.load(p_to_ids + i_block).to(tl.int64)
    tl.store(p_to + target * stride_to + o, tl.load(p_from + source * stride_from + o, mask=m), mask=m)


@triton.jit(do_not_specialize=["num_rows"])
def _pack_int4_kernel(
    p_x, p_packed, p_scales, num_rows, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    HALF: tl.constexpr = HEAD_DIM // 2
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = tl.arange(0, BLOCK_HALF)
    m_r = rows < num_rows
    m = m_r[:, None] & (o < HALF)[None, :]
    p_in = p_x + rows[:, None] * HEAD_DIM + o[None, :]
    b_low = tl.load(p_in, mask=m, other=0.0).to(tl.float32)
    b_high = tl.load(p_in + HALF, mask=m, other=0.0).to(tl.float32)
    b_top = tl.maximum(tl.max(tl.abs(b_low), 1), tl.max(tl.abs(b_high), 1))
    b_scale = (b_top / 7.0).to(tl.float16)
    b_inverse = tl.where(b_scale > 0, 1.0 / tl.where(b_scale > 0, b_scale.to(tl.float32), 1.0), 0.0)[:, None]
    # round half up on a shifted, non-negative value, where truncation is the floor
    b_low = tl.minimum(tl.maximum(b_low * b_inverse + 8.5, 1.0), 15.0).to(tl.int32)
    b_high = tl.minimum(tl.maximum(b_high * b_inverse + 8.5, 1.0), 15.0).to(tl.int32)
    tl.store(p_packed + rows[:, None] * HALF + o[None, :], (b_low | (b_high << 4)).to(tl.uint8), mask=m)
    tl.store(p_scales + rows, b_scale, mask=m_r)


@triton.jit(do_not_specialize=["num_rows"])
def _unpack_int4_kernel(
    p_packed, p_scales, p_out, num_rows, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    HALF: tl.constexpr = HEAD_DIM // 2
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = tl.arange(0, BLOCK_HALF)
    m_r = rows < num_rows
    m = m_r[:, None] & (o < HALF)[None, :]
    b_packed = tl.load(p_packed + rows[:, None] * HALF + o[None, :], mask=m, other=0).to(tl.int32)
    b_scale = tl.load(p_scales + rows, mask=m_r, other=0.0).to(tl.float32)[:, None]
    b_low = ((b_packed & 0xF) - 8).to(tl.float32) * b_scale
    b_high = ((b_packed >> 4) - 8).to(tl.float32) * b_scale
    p_o = p_out + rows[:, None] * HEAD_DIM + o[None, :]
    tl.store(p_o, b_low.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_o + HALF, b_high.to(p_out.dtype.element_ty), mask=m)


def rotary_and_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_out: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Rotate q and k of qkv [num_tokens, (heads + 2 * kv_heads) * head_dim]; q goes to q_out, k and v to the cache.

    q_out [num_tokens, heads, head_dim] contiguous per token; positions int [num_tokens]; slots int [num_tokens];
    cos_sin float32 [max_position, head_dim]; `norms` = (q weight, k weight, eps) normalises every head first (Qwen3).
    """
    num_tokens, num_heads, head_dim = q_out.shape
    num_kv_heads = k_cache.shape[2]
    q_norm, k_norm, eps = norms or (cos_sin, cos_sin, 0.0)
    group = num_heads // num_kv_heads
    per_program = max(1, min(num_kv_heads, ROTARY_HEADS // group))
    _rotary_write_kernel[(num_tokens, triton.cdiv(num_kv_heads, per_program))](
        qkv, positions, slots, cos_sin, q_norm, k_norm, q_out, k_cache, v_cache, eps, 1.0 / k_scale, 1.0 / v_scale,
        qkv.stride(0), cos_sin.stride(0), q_out.stride(0),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=k_cache.shape[1],
        HAS_NORM=norms is not None, KV_PER_PROGRAM=per_program, BLOCK_Q=triton.next_power_of_2(per_program * group),
        BLOCK_KV=triton.next_power_of_2(per_program), BLOCK_HALF=triton.next_power_of_2(head_dim // 2), num_warps=4,
        **overlap(qkv),
    )  # fmt: skip
    return q_out


def copy_blocks(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """target[target_ids[i]] = source[source_ids[i]] for whole blocks: gather, scatter and copy are this one launch.

    source, target [num_blocks, ...] of equal block shape, each block contiguous; source and target may be one tensor if
    the two id sets do not meet.
    """
    size = source[0].numel()
    if target[0].numel() != size or not (source[0].is_contiguous() and target[0].is_contiguous()):
        raise ValueError(
            f"blocks of {tuple(source.shape[1:])} and {tuple(target.shape[1:])} must be contiguous and of one size"
        )
    block = min(4096, triton.next_power_of_2(size))
    _copy_blocks_kernel[(source_ids.shape[0], triton.cdiv(size, block))](
        source, target, source_ids, target_ids, source.stride(0), target.stride(0), size, BLOCK=block, num_warps=4
    )


def pack_fp8(blocks: Tensor, scale: float) -> Tensor:
    """blocks / scale as fp8 e4m3, saturated at +-448 (half the bytes of bf16)."""
    return (blocks.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def unpack_fp8(packed: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_fp8`, up to its rounding."""
    return (packed.float() * scale).to(dtype)


def pack_int4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(packed uint8 [..., head_dim / 2], float16 scales [...]) of contiguous blocks [..., head_dim].

    Symmetric per token and head: value = (nibble - 8) * scale; low nibbles hold the first half of the head. 3.76 times
    smaller than bf16 at head_dim 128.
    """
    head_dim = blocks.shape[-1]
    packed = torch.empty(*blocks.shape[:-1], head_dim // 2, dtype=torch.uint8, device=blocks.device)
    scales = torch.empty(blocks.shape[:-1], dtype=torch.float16, device=blocks.device)
    half = triton.next_power_of_2(head_dim // 2)
    _pack_int4_kernel[(triton.cdiv(scales.numel(), PACK_ROWS),)](
        blocks.contiguous(), packed, scales, scales.numel(),
        HEAD_DIM=head_dim, BLOCK_R=PACK_ROWS, BLOCK_HALF=half, num_warps=4,
    )  # fmt: skip
    return packed, scales


def unpack_int4(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_int4`, up to half a step of the scale."""
    head_dim = packed.shape[-1] * 2
    out = torch.empty(*packed.shape[:-1], head_dim, dtype=dtype, device=packed.device)
    half = triton.next_power_of_2(head_dim // 2)
    _unpack_int4_kernel[(triton.cdiv(scales.numel(), PACK_ROWS),)](
        packed, scales, out, scales.numel(), HEAD_DIM=head_dim, BLOCK_R=PACK_ROWS, BLOCK_HALF=half, num_warps=4
    )
    return out
