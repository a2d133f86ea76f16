"""Vectors of all inputs of one request, whatever happens to the workers.

One worker is chosen for the request and gets several inputs at a time, fewer when its queue is full. When it fails, the
inputs that have no vector yet go to the next best worker: a vector does not depend on who computed it.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np

from cloud.gateway.decisions import DecisionLog
from cloud.gateway.fleet import Fleet, WorkerLink
from cloud.gateway.generation import MAX_ATTEMPTS, START_PATIENCE_S, Outcome
from cloud.serving.router import RouteQuery, WorkerView, route
from cloud.serving.rpc import PROTOCOL_VERSION
from model_registry.chat_tokenizer import ChatTokenizer
from wire import engine_pb2 as pb
from wire.decision import Decision
from wire.embeddings import EmbeddingRequest
from wire.errors import ConflictError, ForeshoreError, InvalidInputError, OverloadedError, UnavailableError

MAX_INPUTS = 2048  # of one request, as at OpenAI
MAX_IN_FLIGHT = 16
EMBED_TIMEOUT_S = 120.0


def token_inputs(body: EmbeddingRequest, tokenizer: ChatTokenizer) -> list[list[int]]:
    """Token ids of every input; raises `InvalidInputError` for one without any."""
    inputs = [tokenizer.encode(one) if isinstance(one, str) else one for one in body.inputs(MAX_INPUTS)]
    for index, tokens in enumerate(inputs):
        if not tokens:
            raise InvalidInputError(f"input {index} has no tokens", remedy="send another text", param="input")
    return inputs


@dataclass(frozen=True)
class EmbeddingJob:
    """What to embed, for whom; every input has at least one token."""

    inputs: list[list[int]]
    salt: bytes
    tenant: str
    subject: str = ""
    parent_decision_id: str | None = None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def num_tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(len(tokens) for tokens in self.inputs)

    @property
    def num_longest(self) -> int:
        """Tokens of the longest input."""
        return max(len(tokens) for tokens in self.inputs)


class Vectors:
    """Runs one `EmbeddingJob` over a `Fleet`; call `run` once."""

    def __init__(self, job: EmbeddingJob, fleet: Fleet, log: DecisionLog) -> None:
        self.job = job
        self.outcome = Outcome()
        self._fleet = fleet
        self._log = log
        self._found: dict[int, Any] = {}
        self._excluded: set[str] = set()
        self._began_at = time.monotonic()

    async def run(self) -> list[Any]:
        """One float32 vector per input, in their order. Raises our errors; cancelling it ends the work."""
        last_error: ForeshoreError | None = None
        try:
            for attempt in range(MAX_ATTEMPTS):
                worker = await self._choose(attempt, last_error)
                link = self._fleet.links[worker.name]
                try:
                    await self._embed_missing(link, attempt)
                    return [self._found[index] for index in range(len(self.job.inputs))]
                except (UnavailableError, ConflictError) as error:
                    last_error = error
                    self._excluded.add(worker.name)
                    if not isinstance(error, OverloadedError):
                        link.record_failure()
                        self.outcome.num_failovers += 1
            raise last_error or UnavailableError("no worker could answer", remedy="try again soon")
        finally:
            self._finish()

    async def _choose(self, attempt: int, last_error: ForeshoreError | None) -> WorkerView:
        """Route; with nobody fit, wait a little for a worker to come back."""
        deadline = time.monotonic() + START_PATIENCE_S
        while True:
            self._check_fits()
            decision, worker = self._route(f"{self.job.request_id}-{attempt}" if attempt else self.job.request_id)
            if worker is not None:
                self.outcome.decision, self.outcome.prefill_worker = decision, worker.name
                self._log.put(self.job.tenant, decision)
                return worker
            self.outcome.decision = self.outcome.decision or decision
            if isinstance(last_error, OverloadedError):
                raise last_error
            if time.monotonic() > deadline:
                raise last_error or UnavailableError(
                    f"no serving worker is available: {decision.reason}", remedy="try again soon"
                )
            self._excluded.clear()  # a worker that came back may take it
            await asyncio.sleep(random.uniform(0.1, 0.3))

    def _check_fits(self) -> None:
        limit, longest = self._fleet.max_context_tokens, self.job.num_longest
        if limit and longest > limit:
            index = next(i for i, tokens in enumerate(self.job.inputs) if len(tokens) == longest)
            raise InvalidInputError(
                f"input {index} has {longest} tokens and the context holds {limit}",
                remedy=f"send at most {limit} tokens per input",
                param="input",
                reason="context_length_exceeded",
            )

    def _route(self, decision_id: str) -> tuple[Decision, WorkerView | None]:
        excluded, longest = frozenset(self._excluded), self.job.num_longest
        query = RouteQuery(self.job.num_tokens, excluded=excluded, num_longest=longest)
        now = datetime.now(UTC).isoformat()
        chosen = route(query, self._fleet.views(), decision_id=decision_id, decided_at=now)
        fields = {"parent_id": self.job.parent_decision_id, "subject": self.job.subject}
        return Decision(**{**chosen.decision.__dict__, **fields}), chosen.decode

    async def _embed_missing(self, link: WorkerLink, attempt: int) -> None:
        missing = deque(index for index in range(len(self.job.inputs)) if index not in self._found)
        num_lanes = min(MAX_IN_FLIGHT, len(missing))

        async def work() -> None:
            nonlocal num_lanes
            try:
                while missing:
                    await self._take(link, missing, attempt)
            except OverloadedError:  # fewer at a time then, until the last one is refused
                if num_lanes == 1:
                    raise
            finally:
                num_lanes -= 1

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(num_lanes):
                    group.create_task(work(), name=f"embed {number}")
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def _take(self, link: WorkerLink, missing: deque[int], attempt: int) -> None:
        index = missing.popleft()
        try:
            self._found[index] = await self._embed(link, index, attempt)
        except OverloadedError:
            missing.appendleft(index)
            raise

    async def _embed(self, link: WorkerLink, index: int, attempt: int) -> Any:
        message = pb.EmbedRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"{self.job.request_id}.{index}.{attempt}",
            token_ids=self.job.inputs[index],
            salt=self.job.salt,
        )
        link.num_in_flight += 1
        try:
            reply = await link.stub.Embed(message, metadata=link.metadata, timeout=EMBED_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise link.error_of(error) from error
        finally:
            link.num_in_flight -= 1
        link.breaker.record_success()
        self.outcome.cached_tokens += reply.cached_tokens
        self.outcome.prefill_tokens += len(self.job.inputs[index]) - reply.cached_tokens
        return np.array(reply.vector, dtype=np.float32)

    def _finish(self) -> None:
        outcome = self.outcome
        if outcome.decision is None:
            return
        actual = {
            "total_ms": (time.monotonic() - self._began_at) * 1000,
            "input_tokens": float(self.job.num_tokens),
            "cached_tokens": float(outcome.cached_tokens),
            "failovers": float(outcome.num_failovers),
        }
        outcome.decision = outcome.decision.with_actual(actual)
        self._log.finish(self.job.tenant, outcome.decision)
