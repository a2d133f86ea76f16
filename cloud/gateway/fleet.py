"""The serving workers as the gateway sees them: channels, their polled status, and a circuit breaker each."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from cloud.serving.breaker import Breaker
from cloud.serving.router import PREFIX_BYTES, WorkerView
from cloud.serving.rpc import OPTIONS, PROTOCOL_VERSION, credentials_metadata, engine_stub, error_from
from wire import engine_pb2 as pb
from wire.errors import ForeshoreError, InvalidInputError, NotAllowedError, NotAuthenticatedError, UnavailableError

POLL_S = 0.5
_POLL_TIMEOUT_S = 3.0
_STALE_S = 10.0
_SPEC = re.compile(
    r"(?P<name>[\w.-]{1,64})=(?P<role>prefill|decode|both)@(?P<address>[^@#\s]+:\d{1,5})(#(?P<model>.+))?"
)


@dataclass(frozen=True)
class WorkerSpec:
    """Where a worker is and what it is for. `model` is empty for the gateway's first model."""

    name: str
    role: str
    address: str
    model: str = ""


def parse_worker(text: str) -> WorkerSpec:
    """`NAME=ROLE@HOST:PORT` or `NAME=ROLE@HOST:PORT#MODEL`."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise InvalidInputError(f"worker {text!r}", remedy="write NAME=prefill|decode|both@HOST:PORT[#MODEL]")
    return WorkerSpec(match["name"], match["role"], match["address"], match["model"] or "")


class WorkerLink:
    """One worker: how to reach it and what it said last."""

    def __init__(self, spec: WorkerSpec, token: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.spec = spec
        self.metadata = credentials_metadata(token)
        self.breaker = Breaker()
        self.num_in_flight = 0
        self.status: Any = None
        self._clock = clock
        self._seen_at = 0.0
        self._prefixes: frozenset[bytes] = frozenset()
        self._channel = grpc.aio.insecure_channel(spec.address, options=OPTIONS)
        self.stub = engine_stub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)

    async def poll(self) -> None:
        """Ask for the status once; failures show in `view`."""
        known = self.status.prefix_version if self.status is not None else 0
        try:
            status = await self.stub.Status(
                pb.StatusRequest(protocol_version=PROTOCOL_VERSION, known_prefix_version=known),
                timeout=_POLL_TIMEOUT_S,
                metadata=self.metadata,
            )
        except grpc.aio.AioRpcError:
            if self.status is not None:
                self.status = None
                self._prefixes = frozenset()
            return
        if status.prefix_version != known:
            data = status.prefixes
            self._prefixes = frozenset(data[i : i + PREFIX_BYTES] for i in range(0, len(data), PREFIX_BYTES))
        if self.status is None or status.boot_epoch != self.status.boot_epoch:
            self.breaker.record_success()
        self.status = status
        self._seen_at = self._clock()

    def error_of(self, rpc_error: Any) -> ForeshoreError:
        """What a failed call to this worker means to a client of the gateway, who is not the one it refuses."""
        cause = error_from(rpc_error)
        if isinstance(cause, (NotAuthenticatedError, NotAllowedError)):
            return UnavailableError(f"worker {self.spec.name} refuses this gateway", remedy="check --worker-token-file")
        return cause

    def record_failure(self) -> None:
        """A request failed here: pause the worker and forget what it said."""
        self.breaker.record_failure(self._clock())

    def view(self) -> WorkerView:
        """What the router may know."""
        now = self._clock()
        spec, status = self.spec, self.status
        if status is None:
            return WorkerView(spec.name, spec.role, spec.address, unfit=("unreachable",))
        unfit = []
        if status.state != "serving":
            unfit.append(f"state is {status.state}")
        if self.breaker.is_open(now):
            unfit.append("paused after a failure")
        if now - self._seen_at > _STALE_S:
            unfit.append(f"no status for {now - self._seen_at:.0f} s")
        return WorkerView(
            name=spec.name,
            role=spec.role,
            address=spec.address,
            unfit=tuple(unfit),
            fingerprint=status.fingerprint,
            block_size=status.block_size,
            max_context_tokens=status.max_context_tokens,
            num_running=max(status.num_running, self.num_in_flight),
            num_waiting=status.num_waiting,
            num_waiting_tokens=status.num_waiting_tokens,
            kv_usage=1 - status.num_free_blocks / max(1, status.num_blocks),
            prefixes=self._prefixes,
            embedding_size=status.embedding_size,
            age_s=round(now - self._seen_at, 3),
        )


class Fleet:
    """All workers of one model."""

    def __init__(self, specs: list[WorkerSpec], token: str | None = None) -> None:
        if len({spec.name for spec in specs}) != len(specs):
            raise InvalidInputError("two workers have one name", remedy="name each worker differently")
        self.links = {spec.name: WorkerLink(spec, token) for spec in specs}

    async def watch(self) -> None:
        """Poll every worker until cancelled."""
        async with asyncio.TaskGroup() as group:
            for link in self.links.values():
                group.create_task(_watch(link), name=f"poll {link.spec.name}")

    async def close(self) -> None:
        """Close all channels."""
        for link in self.links.values():
            await link.close()

    def views(self) -> list[WorkerView]:
        """Every worker, in the order of configuration."""
        return [link.view() for link in self.links.values()]

    @property
    def max_context_tokens(self) -> int:
        """The largest context that a worker offers; 0 while none was heard of."""
        return max((view.max_context_tokens for view in self.views()), default=0)


async def _watch(link: WorkerLink) -> None:
    while True:
        await link.poll()
        await asyncio.sleep(POLL_S)
