"""One step on the hardware: chunks from the scheduler in, one drawn token per sampled chunk out.

Owns nothing but the way from Python lists to tensors; a GPU runner replaces this file's class behind the same method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from cloud.serving.backend import Batch, SampledToken, SamplingRow, SequencePlan
from cloud.serving.kv_pool import KvPool
from cloud.serving.models.decoder import Decoder
from cloud.serving.request import Request
from cloud.serving.scheduler import Chunk


class Runner(Protocol):
    """What the engine needs: run these chunks; per chunk the drawn token, or None where none is drawn."""

    def run(self, chunks: Sequence[Chunk]) -> list[SampledToken | None]: ...


class EagerRunner:
    """Runs each step operator by operator. The CPU's runner."""

    def __init__(self, decoder: Decoder, kv: KvPool) -> None:
        self.decoder = decoder
        self.kv = kv

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[SampledToken | None]:
        """See `Runner`."""
        batch = self.decoder.backend.plan(self._build(chunks))
        sampled = [chunk for chunk in chunks if chunk.is_sampled]
        hidden = self.decoder.forward(batch, self.kv)
        if not sampled:
            return [None] * len(chunks)
        rows = [sampling_row(chunk.request) for chunk in sampled]
        tokens = iter(self.decoder.backend.sample(self.decoder.logits(hidden), rows))
        return [next(tokens) if chunk.is_sampled else None for chunk in chunks]

    def _build(self, chunks: Sequence[Chunk]) -> Batch:
        size = self.kv.layout.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sequences: list[SequencePlan] = []
        sampled_rows: list[int] = []
        for chunk in chunks:
            request = chunk.request
            token_ids += request.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            slots += [request.block_ids[p // size] * size + p % size for p in range(chunk.start, chunk.end)]
            blocks = request.block_ids[: -(-chunk.end // size)]
            sequences.append(SequencePlan(blocks, chunk.num_tokens, chunk.end))
            if chunk.is_sampled:
                sampled_rows.append(len(token_ids) - 1)
        return Batch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            sequences=sequences,
            sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64),
        )


def sampling_row(request: Request) -> SamplingRow:
    """What the next draw of this request depends on."""
    has_penalties = request.params.has_penalties
    split = request.num_prompt_tokens
    return SamplingRow(
        params=request.params,
        output_index=request.num_output_tokens,
        prompt_token_ids=request.token_ids[:split] if has_penalties else (),
        output_token_ids=request.token_ids[split:] if has_penalties or request.guide is not None else (),
        guide=request.guide,
    )
