"""One step on the hardware: chunks from the scheduler in, one drawn token or embedding per finished chunk out.

Owns nothing but the way from Python lists to tensors; a GPU runner replaces this file's class behind the same method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from cloud.serving.backend import Batch, Embedding, SamplingRow, SequencePlan, StepResult, Tensor
from cloud.serving.kv_pool import KvPool
from cloud.serving.models.decoder import Decoder
from cloud.serving.pooler import Pooler
from cloud.serving.request import Request
from cloud.serving.scheduler import Chunk


class Runner(Protocol):
    """What the engine needs: run these chunks; per chunk the drawn token or the embedding, None where there is none."""

    def run(self, chunks: Sequence[Chunk]) -> list[StepResult]: ...


class EagerRunner:
    """Runs each step operator by operator. The CPU's runner."""

    def __init__(self, decoder: Decoder, kv: KvPool) -> None:
        self.decoder = decoder
        self.kv = kv
        self.pooler = Pooler()

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[StepResult]:
        """See `Runner`."""
        batch = self.decoder.backend.plan(self._build(chunks))
        hidden = self.decoder.forward(batch, self.kv)
        results: list[StepResult] = [None] * len(chunks)
        if any(chunk.request.pooling is not None for chunk in chunks):
            hidden = self._pool(chunks, hidden, results)
        sampled = [position for position, chunk in enumerate(chunks) if chunk.is_sampled]
        if sampled:
            rows = [sampling_row(chunks[position].request) for position in sampled]
            tokens = self.decoder.backend.sample(self.decoder.logits(hidden), rows)
            for position, token in zip(sampled, tokens, strict=True):
                results[position] = token
        return results

    def _pool(self, chunks: Sequence[Chunk], hidden: Tensor, results: list[StepResult]) -> Tensor:
        """Put the embeddings that are complete into `results`; returns the hidden states that tokens are drawn from."""
        parts = hidden.split([len(chunk.output_rows) for chunk in chunks])
        pooled = self.pooler.pool(chunks, parts)
        if pooled is not None:
            for position, vector in zip(pooled.positions, pooled.vectors, strict=True):
                results[position] = Embedding(vector.numpy())
        drawn = [part for chunk, part in zip(chunks, parts, strict=True) if chunk.request.pooling is None]
        return torch.cat(drawn) if drawn else hidden[:0]

    def _build(self, chunks: Sequence[Chunk]) -> Batch:
        size = self.kv.layout.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sequences: list[SequencePlan] = []
        output_rows: list[int] = []
        for chunk in chunks:
            request = chunk.request
            output_rows += [len(token_ids) + row for row in chunk.output_rows]
            token_ids += request.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            slots += [request.block_ids[p // size] * size + p % size for p in range(chunk.start, chunk.end)]
            blocks = request.block_ids[: -(-chunk.end // size)]
            sequences.append(SequencePlan(blocks, chunk.num_tokens, chunk.end))
        return Batch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            sequences=sequences,
            output_rows=torch.tensor(output_rows, dtype=torch.int64),
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
