"""Drawing tokens from logits, per request and reproducibly.

Order: guide, penalties, temperature, min-p, top-k, top-p, draw. The draw is the largest of logit + Gumbel noise, where
the noise comes from a generator seeded with (seed, output index): a sequence continued elsewhere draws the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch

from cloud.serving.backend import SampledToken, SamplingRow, Tensor
from cloud.serving.request import SamplingParams


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Draw one token per row of logits [R, V]; plain greedy rows share one argmax."""
    best = logits.argmax(dim=-1).tolist()
    return [
        SampledToken(best[i]) if row.params.is_plain_greedy else _sample_row(logits[i].float(), row)
        for i, row in enumerate(rows)
    ]


def _sample_row(logits: Tensor, row: SamplingRow) -> SampledToken:
    params = row.params
    adjusted = logits if row.guide is None else row.guide.restrict(logits, row.output_token_ids)
    adjusted = _apply_penalties(adjusted, row) if params.has_penalties else adjusted
    if params.temperature == 0:
        token = int(adjusted.argmax())
    else:
        token = int((_keep_likely(adjusted / params.temperature, params) + _gumbel(adjusted, row)).argmax())
    return _with_logprobs(token, logits, params.num_logprobs)


def _apply_penalties(logits: Tensor, row: SamplingRow) -> Tensor:
    """Repetition (CTRL, arXiv 1909.05858) over prompt and output; presence and frequency (OpenAI) over the output."""
    params = row.params
    logits = logits.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_token_ids, *row.output_token_ids}), dtype=torch.int64)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.output_token_ids and (params.presence_penalty or params.frequency_penalty):
        seen, counts = torch.tensor(row.output_token_ids, dtype=torch.int64).unique(return_counts=True)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def _keep_likely(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits with everything outside min-p, top-k and top-p at minus infinity; the best token always stays."""
    out = float("-inf")
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), out)
    if 0 < params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], out)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.index_fill(-1, order[before >= params.top_p], out)
    return logits


def _gumbel(logits: Tensor, row: SamplingRow) -> Tensor:
    digest = hashlib.sha256(struct.pack("<QQ", row.params.seed, row.output_index)).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return -torch.empty(logits.shape[-1]).exponential_(generator=generator).log_().to(logits.device)


def _with_logprobs(token: int, logits: Tensor, count: int | None) -> SampledToken:
    if count is None:
        return SampledToken(token)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(count) if count else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else ()
    return SampledToken(token, float(logprobs[token]), pairs)
