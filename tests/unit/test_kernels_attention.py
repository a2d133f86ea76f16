"""Paged attention against its torch reference, in odd shapes, on the GPU when there is one."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU, poisoned, relative_error

from kernels import decode_attention, paged, prefill_attention, reference  # isort: skip  (the interpreter switch comes first)

# float32 products are exact to rounding; half types round the probabilities and the inputs once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def make_case(context_lens, query_lens, heads, kv_heads, head_dim, block_size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    max_blocks = max(1, max(-(-n // block_size) for n in context_lens))
    num_blocks = max_blocks * len(context_lens) + 3
    table = torch.randperm(num_blocks, generator=generator)[: max_blocks * len(context_lens)]
    cache = torch.randn(2, num_blocks, block_size, kv_heads, head_dim, generator=generator)
    q = torch.randn(sum(query_lens), heads, head_dim, generator=generator)
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    return {
        "q": q.to(DEVICE, dtype),
        "k_cache": cache[0].to(DEVICE, dtype),
        "v_cache": cache[1].to(DEVICE, dtype),
        "block_tables": table.view(len(context_lens), max_blocks).to(DEVICE, torch.int32),
        "context_lens": torch.tensor(context_lens, dtype=torch.int32, device=DEVICE),
        "query_starts": starts.to(DEVICE, torch.int32),
        "scale": head_dim**-0.5,
    }


def truth(case):
    upcast = {name: value.double() if name in ("q", "k_cache", "v_cache") else value for name, value in case.items()}
    return reference.paged_attention(**upcast)


def run_decode(case, num_splits):
    arguments = {name: value for name, value in case.items() if name != "query_starts"}
    rows, heads, head_dim = case["q"].shape
    workspace = decode_attention.SplitWorkspace(
        poisoned(rows, heads, num_splits, head_dim), poisoned(rows, heads, num_splits)
    )
    out = poisoned(rows, heads, head_dim, dtype=case["q"].dtype)
    return decode_attention.decode(**arguments, out=out, num_splits=num_splits, workspace=workspace)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(6, 2, 40, 16), (3, 3, 64, 24), (8, 1, 128, 256)]
)
def test_decode_matches_the_reference_for_any_block_size_and_grouping(
    num_splits, heads, kv_heads, head_dim, block_size
):
    lens = [1, 65, 200]
    case = make_case(lens, [1] * len(lens), heads, kv_heads, head_dim, block_size)
    assert relative_error(run_decode(case, num_splits), truth(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_padding_row_without_context_gets_zeros(num_splits):
    case = make_case([0, 17], [1, 1], 4, 2, 32, 16)
    out = run_decode(case, num_splits)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert relative_error(out[1], truth(case)[1]) < TOLERANCE[torch.float32]


# Triton's interpreter multiplies bfloat16 tiles as if they were integers, so bfloat16 products need the real thing.
HALF = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_decode_in_half_types_stays_within_one_rounding_of_the_inputs(dtype):
    case = make_case([33, 70], [1, 1], 4, 2, 64, 16, dtype)
    assert relative_error(run_decode(case, 2), truth(case)) < TOLERANCE[dtype]


def test_decode_reads_a_cache_whose_heads_come_before_its_slots():
    case = make_case([40, 9], [1, 1], 4, 2, 32, 16)
    wanted = truth(case)
    for name in ("k_cache", "v_cache"):
        case[name] = case[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert relative_error(run_decode(case, 1), wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("context_lens", "query_lens"),
    [([5], [5]), ([37, 1, 80], [37, 1, 3]), ([100, 64, 33, 7], [40, 1, 33, 2])],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(6, 2, 40, 16), (4, 4, 64, 24), (7, 1, 32, 64)]
)
def test_prefill_of_chunks_over_a_cached_prefix_matches_the_reference(
    context_lens, query_lens, heads, kv_heads, head_dim, block_size
):
    case = make_case(context_lens, query_lens, heads, kv_heads, head_dim, block_size)
    out = prefill_attention.prefill(**case, out=poisoned(*case["q"].shape))
    assert relative_error(out, truth(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tile", [paged.Tile(16, 16, 4, 2), paged.Tile(64, 32, 4, 2)])
def test_prefill_does_not_depend_on_its_tile(tile):
    case = make_case([50, 23], [21, 23], 4, 2, 32, 16)
    out = prefill_attention.prefill(**case, out=poisoned(*case["q"].shape), tile=tile)
    assert relative_error(out, truth(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", HALF)
def test_prefill_in_half_types_uses_the_large_tiles(dtype):
    length = 300 if ON_GPU else 90
    case = make_case([length, 40], [length - 20, 40], 4, 2, 128, 16, dtype)
    out = prefill_attention.prefill(**case, out=poisoned(*case["q"].shape, dtype=dtype))
    assert relative_error(out, truth(case)) < TOLERANCE[dtype]


def test_splits_without_a_workspace_are_refused_with_the_remedy():
    case = make_case([5], [1], 2, 2, 32, 16)
    case.pop("query_starts")
    with pytest.raises(ValueError, match="SplitWorkspace"):
        decode_attention.decode(**case, out=poisoned(1, 2, 32), num_splits=4)


@pytest.mark.parametrize("limit", [0, 2**31 - 1])
def test_attention_is_the_same_with_offsets_of_32_and_64_bits(limit, monkeypatch):
    monkeypatch.setattr(paged, "MAX_INT32", limit)
    case = make_case([50, 23], [21, 23], 4, 2, 32, 16)
    assert paged.is_large(case["k_cache"], case["v_cache"]) == (limit == 0)
    out = prefill_attention.prefill(**case, out=poisoned(*case["q"].shape))
    assert relative_error(out, truth(case)) < TOLERANCE[torch.float32]


def test_a_pool_of_two_to_the_31_elements_or_more_is_large():
    pool = torch.empty(2**20 + 1, 16, 1, 128, device="meta")
    assert paged.is_large(pool, pool)
    assert not paged.is_large(pool[: 2**20], pool[: 2**20])
