"""Attention of several decoding sequences at once against one at a time."""

from __future__ import annotations

import pytest
import torch

from cloud.serving.backend import Batch, SequencePlan
from cloud.serving.decoding_rows import MAX_GATHERED_BYTES, find_decoding
from cloud.serving.torch_backend import CpuBatch, TorchBackend

BLOCK_SIZE, NUM_KV_HEADS, NUM_HEADS, HEAD_DIM = 4, 2, 6, 8
PLANS = [
    SequencePlan([3, 9, 1], 1, 11),
    SequencePlan([5, 6], 3, 7),
    SequencePlan([2], 1, 1),
    SequencePlan([7, 8], 1, 8),
    SequencePlan([10, 4], 1, 5),
]


def batch_of(sequences: list[SequencePlan]) -> CpuBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    return TorchBackend(is_widening=False).plan(Batch(empty, empty, empty, sequences, empty))


def attend(sequences: list[SequencePlan], query: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
    return TorchBackend(is_widening=False).attend(query, *caches, batch_of(sequences), 0.3)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plans", [PLANS, [PLANS[0], *PLANS[2:]], [PLANS[0], PLANS[0]]])
def test_sequences_together_get_what_each_gets_alone(plans: list[SequencePlan], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    caches = [torch.randn(12, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(2)]
    num_tokens = sum(plan.num_tokens for plan in plans)
    query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype)
    assert batch_of(plans).decoding is not None
    got = attend(plans, query, caches)
    row = 0
    for plan in plans:
        rows = slice(row, row + plan.num_tokens)
        assert batch_of([plan]).decoding is None
        alone = attend([plan], query[rows], caches)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # other order of sums; a rounding of bfloat16
        torch.testing.assert_close(got[rows], alone, rtol=tolerance, atol=tolerance)
        row = rows.stop


def test_nothing_of_another_sequence_is_read() -> None:
    plans = [plan for plan in PLANS if plan.num_tokens == 1]
    caches = [torch.full((12, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), torch.nan) for _ in range(2)]
    for plan in plans[1:]:
        for position in range(plan.context_len):
            for cache in caches:
                cache[plan.block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE] = 1.0
    got = attend(plans, torch.ones(len(plans), NUM_HEADS, HEAD_DIM), caches)
    assert got[0].isnan().all()  # its own context holds nothing else
    assert torch.equal(got[1:], torch.ones_like(got[1:]))


def test_long_contexts_are_read_where_they_are() -> None:
    cache = torch.zeros(1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    longest = MAX_GATHERED_BYTES // (2 * cache[0, 0].nbytes)
    short = SequencePlan([0], 1, 3)
    for context_len, is_worthwhile in ((longest, True), (longest + 1, False)):
        rows = find_decoding([SequencePlan(range(-(-context_len // BLOCK_SIZE)), 1, context_len), short])
        assert rows is not None
        assert rows.is_worthwhile(cache) is is_worthwhile
    assert find_decoding([short]) is None
