"""One answer, whatever happens to the workers: route, stream, and continue elsewhere when a worker dies.

The tokens already given are part of the resumed request, and the seed is fixed before the first attempt, so the answer
is the one that an undisturbed worker would have given. A worker that is silent for too long counts as dead.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc

from cloud.gateway.decisions import DecisionLog
from cloud.gateway.fleet import Fleet
from cloud.serving.block_pool import chain_root, hash_blocks
from cloud.serving.router import PREFIX_BYTES, Route, RouteQuery, WorkerView, route
from cloud.serving.rpc import PROTOCOL_VERSION
from wire import engine_pb2 as pb
from wire.decision import Decision
from wire.errors import (
    ConflictError,
    ForeshoreError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)

MAX_ATTEMPTS = 8
FIRST_TOKEN_TIMEOUT_S = 120.0
NEXT_TOKEN_TIMEOUT_S = 30.0
RESUME_PATIENCE_S = 60.0
START_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Job:
    """What to generate, for whom."""

    token_ids: list[int]
    sampling: dict[str, Any]
    salt: bytes
    tenant: str
    subject: str = ""
    parent_decision_id: str | None = None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Outcome:
    """Where the answer came from and what it cost; filled while it streams."""

    decision: Decision | None = None
    prefill_worker: str = ""
    decode_worker: str = ""
    cached_tokens: int = 0
    prefill_tokens: int = 0
    kv_bytes_moved: int = 0
    num_failovers: int = 0
    handoff_failure: str = ""
    ttft_ms: float = 0.0
    num_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The `foreshore` object of an answer."""
        return {
            "decision_id": self.decision.decision_id if self.decision else None,
            "reason": self.decision.reason if self.decision else "",
            "prefill_worker": self.prefill_worker,
            "decode_worker": self.decode_worker,
            "cached_tokens": self.cached_tokens,
            "prefill_tokens": self.prefill_tokens,
            "kv_bytes_moved": self.kv_bytes_moved,
            "failovers": self.num_failovers,
            "handoff_failure": self.handoff_failure,
            "ttft_ms": round(self.ttft_ms, 2),
        }


class Generation:
    """Runs one `Job` over a `Fleet`; iterate `stream` once."""

    def __init__(self, job: Job, fleet: Fleet, log: DecisionLog) -> None:
        self.job = job
        self.outcome = Outcome()
        self._fleet = fleet
        self._log = log
        self._emitted: list[int] = []
        self._excluded: set[str] = set()
        self._began_at = time.monotonic()
        self._hashes: dict[str, list[bytes]] = {}

    async def stream(self) -> AsyncGenerator[Any, None]:
        """Token messages, then the finish reason as a string. Raises our errors; closing it aborts the request."""
        last_error: ForeshoreError | None = None
        try:
            for attempt in range(MAX_ATTEMPTS):
                chosen = await self._choose(attempt, last_error)
                assert chosen.decode is not None
                try:
                    async with aclosing(self._attempt(chosen, attempt)) as events:
                        async for event in events:
                            yield event
                            if isinstance(event, str):
                                return
                except (UnavailableError, ConflictError) as error:
                    last_error = error
                    self._excluded.add(chosen.decode.name)
                    if not isinstance(error, OverloadedError):
                        self._fleet.links[chosen.decode.name].record_failure()
                        self.outcome.num_failovers += 1
            raise last_error or UnavailableError("no worker could answer", remedy="try again soon")
        finally:
            self._finish()

    async def _choose(self, attempt: int, last_error: ForeshoreError | None) -> Route:
        """Route; with nobody fit, wait a little for a worker to come back, longer when an answer has begun."""
        patience = RESUME_PATIENCE_S if self._emitted else START_PATIENCE_S
        deadline = time.monotonic() + patience
        while True:
            chosen = self._route(f"{self.job.request_id}-{attempt}" if attempt else self.job.request_id)
            if chosen.decode is not None:
                self.outcome.decision = chosen.decision
                self._log.put(self.job.tenant, chosen.decision)
                return chosen
            self.outcome.decision = self.outcome.decision or chosen.decision
            if isinstance(last_error, OverloadedError):
                raise last_error
            self._check_fits()
            if time.monotonic() > deadline:
                raise last_error or UnavailableError(
                    f"no serving worker is available: {chosen.decision.reason}", remedy="try again soon"
                )
            self._excluded.clear()  # a worker that came back may take it
            await asyncio.sleep(random.uniform(0.1, 0.3))

    def _check_fits(self) -> None:
        limit = self._fleet.max_context_tokens
        if limit and len(self.job.token_ids) >= limit:
            raise InvalidInputError(
                f"the prompt has {len(self.job.token_ids)} tokens and the context holds {limit} with the answer",
                remedy=f"send fewer than {limit} tokens",
                param="messages",
                reason="context_length_exceeded",
            )

    def _route(self, decision_id: str) -> Route:
        views = self._fleet.views()
        tokens = self.job.token_ids + self._emitted
        chosen = route(
            RouteQuery(len(tokens), self._prefixes(views), frozenset(self._excluded)),
            views,
            decision_id=decision_id,
            decided_at=datetime.now(UTC).isoformat(),
        )
        parent = self.job.parent_decision_id
        decision = Decision(**{**chosen.decision.__dict__, "parent_id": parent, "subject": self.job.subject})
        return Route(decision, chosen.decode, chosen.prefill)

    def _prefixes(self, views: list[WorkerView]) -> dict[str, list[bytes]]:
        for view in views:
            if view.fingerprint and view.fingerprint not in self._hashes:
                root = chain_root(view.fingerprint, self.job.salt)
                names = hash_blocks(root, self.job.token_ids, view.block_size)
                self._hashes[view.fingerprint] = [name[:PREFIX_BYTES] for name in names]
        return self._hashes

    async def _attempt(self, chosen: Route, attempt: int) -> AsyncGenerator[Any, None]:
        assert chosen.decode is not None
        link = self._fleet.links[chosen.decode.name]
        call = link.stub.Generate(self._message(chosen, attempt), metadata=link.metadata)
        link.num_in_flight += 1
        self.outcome.decode_worker = chosen.decode.name
        self.outcome.prefill_worker = (chosen.prefill or chosen.decode).name
        timeout = FIRST_TOKEN_TIMEOUT_S
        try:
            while True:
                async with asyncio.timeout(timeout):
                    event = await call.read()
                if event is grpc.aio.EOF:
                    raise UnavailableError(f"worker {link.spec.name} ended its stream early", remedy="try again")
                if event.HasField("started"):
                    self._note_started(event.started, chosen)
                    continue
                timeout = NEXT_TOKEN_TIMEOUT_S
                if event.HasField("finished"):
                    link.breaker.record_success()
                    yield event.finished.reason
                    return
                self._note_token(event.token)
                yield event.token
        except TimeoutError as error:
            raise UnavailableError(f"worker {link.spec.name} sent nothing for {timeout:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise link.error_of(error) from error
        finally:
            link.num_in_flight -= 1
            call.cancel()

    def _message(self, chosen: Route, attempt: int) -> Any:
        message = pb.GenerateRequest(
            protocol_version=PROTOCOL_VERSION,
            request_id=f"{self.job.request_id}.{attempt}",
            token_ids=self.job.token_ids + self._emitted,
            num_prompt_tokens=len(self.job.token_ids),
            sampling=pb.Sampling(**self.job.sampling),
            salt=self.job.salt,
        )
        if chosen.prefill is not None:
            message.prefill.worker = chosen.prefill.name
            message.prefill.address = chosen.prefill.address
        return message

    def _note_started(self, started: Any, chosen: Route) -> None:
        outcome = self.outcome
        held = started.cached_tokens - started.received_tokens
        remote = min(started.remote_cached_tokens, started.cached_tokens) if started.received_tokens else 0
        outcome.kv_bytes_moved += started.received_bytes
        if started.prefill_failure:
            outcome.handoff_failure = started.prefill_failure
            if chosen.prefill is not None and not started.prefill_failure.startswith("no room"):
                self._fleet.links[chosen.prefill.name].record_failure()
        if chosen.prefill is not None and not started.received_tokens:
            outcome.prefill_worker = outcome.decode_worker
        if not self._emitted:
            outcome.cached_tokens = min(max(held, remote), len(self.job.token_ids))
            outcome.prefill_tokens = len(self.job.token_ids) - outcome.cached_tokens

    def _note_token(self, token: Any) -> None:
        if not self._emitted:
            self.outcome.ttft_ms = (time.monotonic() - self._began_at) * 1000
        self._emitted.append(token.token_id)
        self.outcome.num_tokens += 1

    def _finish(self) -> None:
        outcome = self.outcome
        if outcome.decision is None:
            return
        actual = {
            "ttft_ms": outcome.ttft_ms,
            "total_ms": (time.monotonic() - self._began_at) * 1000,
            "output_tokens": float(outcome.num_tokens),
            "cached_tokens": float(outcome.cached_tokens),
            "kv_bytes_moved": float(outcome.kv_bytes_moved),
            "failovers": float(outcome.num_failovers),
        }
        outcome.decision = outcome.decision.with_actual(actual)
        self._log.finish(self.job.tenant, outcome.decision)
