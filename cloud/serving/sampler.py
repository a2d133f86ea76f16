"""Drawing tokens from logits, per request and reproducibly.

Order: guide, penalties, temperature, then the draw: the largest of logit + Gumbel noise among the tokens that min-p,
top-k and top-p keep. Each filter looks at the whole distribution: a token stays when its probability is at least min-p
of the best one's, fewer than top-k tokens are likelier, and the likelier ones together hold less than top-p. So what a
token's own logit decides is decided for all less likely ones too, and no order of all tokens is needed. The noise is a
function of (seed, output index, token): a sequence continued elsewhere, on a GPU too, draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cloud.serving.backend import SampledToken, SamplingRow, Tensor
from cloud.serving.request import SamplingParams
from kernels.noise import gumbel


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
        noise = gumbel(params.seed, row.output_index, logits.shape[-1]).to(logits.device)
        token = _draw(adjusted * (1 / params.temperature), noise, params)
    return _with_logprobs(token, logits, params.num_logprobs)


def _apply_penalties(logits: Tensor, row: SamplingRow) -> Tensor:
    """Repetition (CTRL, arXiv 1909.05858) over prompt and output; presence and frequency (OpenAI) over the output."""
    params = row.params
    logits = logits.clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_token_ids, *row.output_token_ids}), dtype=torch.int64)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values * (1 / penalty), values * penalty)
    if row.output_token_ids and (params.presence_penalty or params.frequency_penalty):
        seen, counts = torch.tensor(row.output_token_ids, dtype=torch.int64).unique(return_counts=True)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def _draw(logits: Tensor, noise: Tensor, params: SamplingParams) -> int:
    """The largest sum among the tokens kept; one that is not kept tells that all less likely ones are not either."""
    masses = (logits - logits.max()).exp()
    limit = params.top_p * masses.sum()
    lowest = logits.max() + math.log(params.min_p) if params.min_p > 0 else -math.inf
    sums = (logits + noise).masked_fill(logits < lowest, -math.inf)
    while True:
        token = int(sums.argmax())
        likelier = logits > logits[token]
        is_likely = params.top_p == 1 or masses[likelier].sum() < limit
        if is_likely and not 0 < params.top_k <= likelier.sum():
            return token
        sums = sums.masked_fill(~likelier, -math.inf)


def _with_logprobs(token: int, logits: Tensor, count: int | None) -> SampledToken:
    if count is None:
        return SampledToken(token)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(count) if count else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else ()
    return SampledToken(token, float(logprobs[token]), pairs)
