"""Draws made on the device: what each row's draw depends on goes there with the step, the token stays there.

Only log probabilities and JSON schemas need the logits on the host. The counts that penalties read are built when a
request enters its row and raised by each draw; where a draw was made on the host the row is built anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cloud.serving.cuda_step import UNKNOWN_TOKEN
from cloud.serving.request import Request
from kernels import sampling

Tensor = Any


class CudaDraws:
    """The state of drawing for the rows of one runner; `latest` is where tokens land, by row."""

    def __init__(self, latest: Tensor, vocab_size: int) -> None:
        self._latest = latest
        self._vocab_size = vocab_size
        self._counts: Tensor = torch.zeros(1, dtype=torch.int32, device=latest.device)  # grows with the first penalty
        self._counted: dict[int, tuple[Request, int]] = {}  # by row: whose ids are counted, and how many

    def count(self, requests: Sequence[Request], rows: Sequence[int]) -> None:
        """Bring the counts up to date, before the forward pass: it overwrites `latest`, which a count may need."""
        for request, row in zip(requests, rows, strict=True):
            if request.params.has_penalties:
                self._keep_count(request, row)

    def draw(self, logits: Tensor, out: Tensor, requests: Sequence[Request], rows: Sequence[int]) -> None:
        """Draw a token per row of logits [R, vocab] into `out` int32 [R] and `latest`, without waiting."""
        packed = torch.from_numpy(sampling.pack([_draw(r, row) for r, row in zip(requests, rows, strict=True)]))
        if logits.is_cuda:
            packed = packed.pin_memory().to(logits.device, non_blocking=True)
        sampling.draw(logits, packed, self._counts, self._latest, out)

    def _keep_count(self, request: Request, row: int) -> None:
        counted = self._counted.get(row)
        if counted is None or counted[0] is not request or counted[1] != request.num_tokens:
            self._count_anew(request, row)
        self._counted[row] = (request, request.num_tokens + 1)  # this draw counts its own token

    def _count_anew(self, request: Request, row: int) -> None:
        if self._counts.dim() == 1:
            shape = (len(self._latest), self._vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._latest.device)
        split = request.num_prompt_tokens
        ids = np.asarray(request.token_ids)
        output = ids[split:]
        counts = 2 * np.bincount(output[output != UNKNOWN_TOKEN], minlength=self._vocab_size).astype(np.int32)
        counts[ids[:split]] |= 1
        self._counts[row] = torch.from_numpy(counts).to(self._counts.device)
        if ids[-1] == UNKNOWN_TOKEN:
            self._counts[row].index_add_(0, self._latest[row : row + 1], self._counts.new_tensor([2]))


def _draw(request: Request, row: int) -> sampling.Draw:
    params = request.params
    return sampling.Draw(
        row=row,
        seed=params.seed,
        number=request.num_output_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        is_penalised=params.has_penalties,
    )
