"""The decode worker's side of a hand-off: ask a prefill worker for a prompt's KV blocks and take in what is right.

Blocks that this worker already holds are locked and not sent. Received blocks are written into blocks nobody else can
see and are named only when every part was verified. Whatever goes wrong (death, stall, damage, no room), the verified
beginning is kept, the rest is computed here, and the reason is reported.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from dataclasses import dataclass
from typing import Any

import grpc

from cloud.serving.block_pool import BlockPool
from cloud.serving.engine_thread import EngineThread
from cloud.serving.handoff import Part, Receiver
from cloud.serving.request import Request
from cloud.serving.rpc import OPTIONS, PROTOCOL_VERSION, credentials_metadata, engine_stub, error_from
from wire import engine_pb2 as pb
from wire.errors import ForeshoreError, IntegrityError, UnavailableError

MAX_PEERS = 64
FIRST_PART_TIMEOUT_S = 30.0
NEXT_PART_TIMEOUT_S = 10.0


@dataclass
class Received:
    """What a hand-off brought. `failure` is empty when everything that was wanted came."""

    num_blocks: int = 0
    num_bytes: int = 0
    remote_cached_tokens: int = 0
    failure: str = ""
    is_refusal: bool = False  # the content was wrong, as opposed to a peer that was gone


class PrefillClient:
    """Fetches blocks from prefill workers over channels that are kept open."""

    def __init__(self, engine: EngineThread, token: str | None = None) -> None:
        self._engine = engine
        self._metadata = credentials_metadata(token)
        self._channels: dict[str, Any] = {}

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close(None)

    async def fetch(self, request: Request, salt: bytes, address: str) -> Received:
        """Fill `request.held_block_ids` with the prompt's leading blocks: those here, then those received."""
        engine = self._engine.engine
        size = engine.pool.block_size
        names = list(itertools.islice(request.hashes(size), (request.num_tokens - 1) // size))
        intake = _Intake(engine.pool, request, names)
        received = Received()
        try:
            await self._engine.call(intake.open)
            if not intake.fresh:
                received.failure = "" if intake.num_held == len(names) else "no room for received blocks"
                return received
            layout = engine.kv.layout
            epoch = secrets.randbits(64)
            receiver = Receiver(names, intake.num_held, epoch, layout.num_layers, layout.bytes_per_layer)
            try:
                await self._read(request, salt, address, receiver, intake, epoch, received)
            except ForeshoreError as error:
                received.failure = f"{error.code}: {error.message}"
                received.is_refusal = isinstance(error, IntegrityError)
            received.num_blocks = receiver.num_complete_blocks
            received.num_bytes = receiver.num_bytes
            self._engine.post(lambda: intake.adopt(received.num_blocks))
        except BaseException:
            self._engine.post(intake.abandon)
            raise
        return received

    async def _read(
        self,
        request: Request,
        salt: bytes,
        address: str,
        receiver: Receiver,
        intake: _Intake,
        epoch: int,
        received: Received,
    ) -> None:
        engine = self._engine.engine
        num_tokens = (intake.num_held + len(intake.fresh)) * engine.pool.block_size
        call = engine_stub(self._channel(address)).Prefill(
            pb.PrefillRequest(
                protocol_version=PROTOCOL_VERSION,
                request_id=f"{request.request_id}/{epoch:016x}",
                token_ids=request.token_ids[:num_tokens],
                salt=salt,
                fingerprint=engine.fingerprint,
                num_held_blocks=intake.num_held,
                lease_epoch=epoch,
                priority=request.priority,
            ),
            metadata=self._metadata,
        )
        timeout = FIRST_PART_TIMEOUT_S
        try:
            while True:
                async with asyncio.timeout(timeout):
                    event = await call.read()
                timeout = NEXT_PART_TIMEOUT_S
                if event is grpc.aio.EOF:
                    break
                if event.HasField("done"):
                    received.remote_cached_tokens = event.done.cached_tokens
                    continue
                part = Part(**{name: getattr(event.block, name) for name in Part.__dataclass_fields__})
                receiver.accept(part)
                # a copy of at most 2 MiB; in a thread it could outlive a cancelled request and its blocks
                block = intake.fresh[part.index - intake.num_held]
                engine.kv.write_block(block, part.first_layer, part.num_layers, part.payload)
        except TimeoutError as error:
            raise UnavailableError(f"the prefill worker at {address} sent nothing for {timeout:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from error
        finally:
            call.cancel()
        if not receiver.is_complete:
            raise UnavailableError(
                f"the prefill worker at {address} stopped after {receiver.num_complete_blocks} blocks"
            )

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            if len(self._channels) >= MAX_PEERS:
                raise UnavailableError(f"{MAX_PEERS} prefill workers are known already", remedy="restart the worker")
            self._channels[address] = grpc.aio.insecure_channel(address, options=OPTIONS)
        return self._channels[address]


class _Intake:
    """Blocks on both sides of a hand-off's border. Its methods run in the engine's thread, in the order of calls."""

    def __init__(self, pool: BlockPool, request: Request, names: list[bytes]) -> None:
        self.num_held = 0
        self.fresh: list[int] = []  # allocated, invisible to others until adopted
        self._pool = pool
        self._request = request
        self._names = names

    def open(self) -> None:
        """Lock what is here and allocate room for the rest; no room leaves `fresh` empty."""
        self._request.held_block_ids = self._pool.find_prefix(self._names)
        self._pool.lock(self._request.held_block_ids)
        self.num_held = len(self._request.held_block_ids)
        self.fresh = self._pool.allocate(len(self._names) - self.num_held) or []

    def adopt(self, count: int) -> None:
        """Name the first `count` received blocks and hold them for the request; give the others back."""
        for block, name in zip(self.fresh[:count], self._names[self.num_held :], strict=False):
            self._pool.seal(block, name)
        self._request.held_block_ids.extend(self.fresh[:count])
        self._pool.free(self.fresh[count:])
        self.fresh = []

    def abandon(self) -> None:
        """Give everything back: the request will not be queued."""
        self._pool.free(self.fresh)
        self._pool.free(self._request.held_block_ids)
        self.fresh, self._request.held_block_ids = [], []
