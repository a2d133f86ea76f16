"""The engine one step ahead: the next step is scheduled and launched while the device works on this one.

Order of a step: schedule N, launch N, wait for N-1, put its tokens in place of the placeholders, complete N with
placeholders. Blocks are sealed in `complete`, so every hash is over known tokens. A request that turns out to have
stopped was launched once too often; that token is dropped. Requests that need logits on the host make the engine wait
for N-1 before launching N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloud.serving.backend import SampledToken
from cloud.serving.cuda_runner import CudaRunner, InFlight
from cloud.serving.cuda_step import UNKNOWN_TOKEN
from cloud.serving.engine import Engine, StepEvent
from cloud.serving.kv_pool import KvPool
from cloud.serving.request import FinishReason, Request, State
from cloud.serving.scheduler import Chunk, ParkedBlocks, Scheduler
from wire.errors import InvalidInputError


@dataclass
class _Pending:
    """A completed step whose tokens are not known yet."""

    chunks: list[Chunk]
    flight: InFlight
    token_index: list[int | None]  # where each chunk's token belongs in its request
    parked: ParkedBlocks


class OverlappedEngine(Engine):
    """`Engine` over a `CudaRunner`; `step` returns the events of the step before."""

    def __init__(self, runner: CudaRunner, scheduler: Scheduler, kv: KvPool, fingerprint: str, vocab_size: int) -> None:
        super().__init__(runner, scheduler, kv, fingerprint, vocab_size)
        self.cuda = runner
        self._pending: _Pending | None = None

    @property
    def has_pending(self) -> bool:
        """Whether a launched step has not been reported yet."""
        return self._pending is not None

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: also a launched one must still be reported."""
        return self.has_pending or self.scheduler.has_work

    def step(self) -> list[StepEvent]:
        """Launch the next step and report the one before; empty when there was none."""
        chunks = self.scheduler.schedule()
        events: list[StepEvent] = []
        if any(chunk.request.params.needs_host_logits for chunk in chunks):
            events = self._settle()
            chunks = [chunk for chunk in chunks if chunk.request.state is State.RUNNING]
        if not chunks:
            return events + self._settle()
        flight = self.cuda.launch(chunks)
        is_sampled = [chunk.is_sampled for chunk in chunks]
        events += self._settle()
        alive = [chunk.request.state is State.RUNNING for chunk in chunks]
        index = [
            chunk.request.num_tokens if sampled and here else None
            for chunk, sampled, here in zip(chunks, is_sampled, alive, strict=True)
        ]
        parked = self.scheduler.complete(chunks, [UNKNOWN_TOKEN if sampled else None for sampled in is_sampled])
        self._pending = _Pending(chunks, flight, index, parked)
        self.num_steps += 1
        self.num_prefill_tokens += sum(c.num_tokens for c in chunks if c.start < c.request.num_prompt_tokens)
        return events

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Run these requests to the end and return their outputs. For tests and benchmarks."""
        for request in requests:
            self.scheduler.add(request)
        while self.has_pending or any(request.finish_reason is None for request in requests):
            before = self.num_steps
            if not self.step() and self.num_steps == before:
                raise InvalidInputError("the engine cannot make progress", remedy="give it more KV blocks")
        return [request.token_ids[request.num_prompt_tokens :] for request in requests]

    def _settle(self) -> list[StepEvent]:
        """Wait for the pending step and put its tokens where they belong."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        events = []
        for chunk, result, index in zip(pending.chunks, pending.flight.wait(), pending.token_index, strict=True):
            request = chunk.request
            token, embedding = (result, None) if isinstance(result, SampledToken) else (None, result)
            if token is not None and index is None:
                continue  # it had stopped before this token
            if token is not None and index is not None:
                request.token_ids[index] = token.token_id
                self.num_output_tokens += 1
                if self._is_stop(request, token.token_id) and request.finish_reason in (None, FinishReason.LENGTH):
                    self.scheduler.cancel(request.request_id)
                    request.finish_reason = FinishReason.STOP
            is_last = index is None or index == request.num_tokens - 1
            events.append(
                StepEvent(
                    request.request_id,
                    token,
                    request.finish_reason if is_last else None,
                    request.num_cached_tokens or 0,
                    tuple(pending.parked.get(request.request_id, ())),
                    embedding,
                )
            )
        return events

    def _is_stop(self, request: Request, token_id: int) -> bool:
        params = request.params
        if token_id in params.stop_token_ids:
            return True
        return token_id in self.scheduler.eos_token_ids and not params.ignore_eos
