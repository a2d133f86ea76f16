"""Norm, activation, rotary + KV write and block moves against their references, in odd shapes."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU, poisoned, relative_error

from kernels import activation, kv_cache, norm, reference  # isort: skip  (the interpreter switch comes first)

# float32: a few roundings of a sum; bfloat16: the output is rounded once (2^-9 relative, uniform: ~1.7e-3 in the norm),
# twice where the per-head norm is rounded as the unfused model rounds it.
# Triton's interpreter cuts off instead of rounding to nearest, which doubles that.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if ON_GPU else 1e-2}


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 77, 576, 1024])
def test_rms_norm_matches_the_reference(width, dtype):
    x, weight = rand(5, width, dtype=dtype), rand(width, dtype=dtype, seed=1)
    out = norm.rms_norm(x, weight, 1e-6, poisoned(5, width, dtype=dtype))
    assert relative_error(out, reference.rms_norm(x.double(), weight.double(), 1e-6)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_updates_the_residual_in_place(dtype):
    x, residual, weight = rand(3, 130, dtype=dtype), rand(3, 130, dtype=dtype, seed=1), rand(130, dtype=dtype, seed=2)
    wanted = x + residual
    out = norm.add_rms_norm(x, residual, weight, 1e-5, poisoned(3, 130, dtype=dtype))
    assert relative_error(residual, wanted) < TOLERANCE[dtype]
    assert torch.equal(residual, wanted) or not ON_GPU
    assert relative_error(out, reference.rms_norm(residual.double(), weight.double(), 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [1, 100, 2051])
def test_silu_mul_matches_the_reference(width):
    x = rand(4, 2 * width)
    out = activation.silu_mul(x, poisoned(4, width))
    assert relative_error(out, reference.silu_mul(x.double())) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (9, 3), (40, 2), (18, 9)])
def test_rotary_and_write_rotates_queries_and_fills_only_the_named_slots(heads, kv_heads, with_norm, dtype):
    dim, tokens, block_size = 24, 5, 16
    qkv = rand(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    positions = torch.tensor([0, 7, 3, 30, 1], dtype=torch.int64, device=DEVICE)
    slots = torch.tensor([5, 33, -1, 16, 0], dtype=torch.int64, device=DEVICE)
    angles = torch.arange(32)[:, None] * 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)
    k_cache, v_cache = (rand(3, block_size, kv_heads, dim, dtype=dtype, seed=s) for s in (3, 4))
    norms = (rand(dim, dtype=dtype, seed=5), rand(dim, dtype=dtype, seed=6), 1e-6) if with_norm else None
    q, k, v = qkv.view(tokens, -1, dim).double().split([heads, kv_heads, kv_heads], dim=1)
    if norms:
        q, k = (reference.rms_norm(t, w.double(), 1e-6) for t, w in ((q, norms[0]), (k, norms[1])))
    wanted_q, wanted_k = (reference.rotary(t, positions, cos_sin) for t in (q, k))
    wanted_k = reference.write_kv(k_cache.double(), wanted_k, slots)
    wanted_v = reference.write_kv(v_cache, v.to(dtype), slots)
    q_out = poisoned(tokens, heads, dim, dtype=dtype)
    kv_cache.rotary_and_write(qkv, positions, slots, cos_sin, k_cache, v_cache, q_out, norms)
    assert relative_error(q_out, wanted_q) < TOLERANCE[dtype]
    assert relative_error(k_cache, wanted_k) < TOLERANCE[dtype]
    assert torch.equal(v_cache, wanted_v)


def test_copy_blocks_gathers_scatters_and_leaves_the_rest_alone():
    pool, wire = rand(7, 5, 3, 9), poisoned(3, 5, 3, 9)
    ids = torch.tensor([6, 0, 2], dtype=torch.int32, device=DEVICE)
    order = torch.arange(3, dtype=torch.int32, device=DEVICE)
    kv_cache.copy_blocks(pool, wire, ids, order)
    assert torch.equal(wire, pool[ids.long()])
    other = rand(7, 5, 3, 9, seed=9)
    wanted = other.clone()
    wanted[ids.long()] = wire
    kv_cache.copy_blocks(wire, other, order, ids)
    assert torch.equal(other, wanted)


def test_blocks_of_different_sizes_are_refused():
    ids = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="one size"):
        kv_cache.copy_blocks(rand(2, 8), rand(2, 9), ids, ids)


@pytest.mark.parametrize("dim", [24, 64])
def test_int4_packing_is_within_half_a_step_of_its_scale(dim):
    blocks = rand(2, 9, 3, dim)
    packed, scales = kv_cache.pack_int4(blocks)
    back = kv_cache.unpack_int4(packed, scales, torch.float32)
    # half a step, plus what a float16 scale cuts off the largest value (7 steps * 2^-11)
    assert ((back - blocks).abs() <= scales[..., None].float() * (0.5 + 7 * 2**-11) + 1e-7).all()
    assert packed.numel() * 2 == blocks.numel()


def test_int4_packing_of_zeros_is_zeros():
    packed, scales = kv_cache.pack_int4(torch.zeros(1, 2, 1, 16, device=DEVICE))
    assert not kv_cache.unpack_int4(packed, scales, torch.float32).any()


def test_fp8_packing_keeps_three_bits_of_mantissa():
    blocks = rand(4, 64)
    back = kv_cache.unpack_fp8(kv_cache.pack_fp8(blocks, 0.01), 0.01, torch.float32)
    assert relative_error(back, blocks) < 2**-4
