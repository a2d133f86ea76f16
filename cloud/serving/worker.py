"""The serving worker: one gRPC program in the roles prefill, decode or both.

The role is what the router should use the worker for, not what it can do: every worker can compute a whole answer, so
the last one standing still serves. Owns the translation between the protocol and the engine; decides nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from cloud.serving.backend import Embedding, SampledToken
from cloud.serving.engine_thread import EngineThread
from cloud.serving.handoff import make_part, split_layers
from cloud.serving.prefill_client import PrefillClient, Received
from cloud.serving.request import Request, SamplingParams
from cloud.serving.rpc import SERVER_OPTIONS, TokenInterceptor, abort, check_version
from wire import engine_pb2 as pb
from wire.engine_pb2_grpc import EngineServicer, add_EngineServicer_to_server
from wire.errors import AbortedError, ConflictError, ForeshoreError, InvalidInputError, UnavailableError

ROLES = ("prefill", "decode", "both")
MAX_REQUEST_ID_CHARS = 200
MAX_SALT_BYTES = 64
MAX_REPORTED_PREFIXES = 8192
PREFIX_BYTES = 8
_ABORTED = "aborted"  # why a task was cancelled
_SNAPSHOT_AGE_S = 0.2


@dataclass(frozen=True)
class WorkerConfig:
    """Name and role of a worker; `token` is the serving tier's shared secret, None only on loopback."""

    name: str
    role: str = "both"
    token: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidInputError(f"role {self.role!r} is unknown", remedy=f"one of {', '.join(ROLES)}")


class EngineService(EngineServicer):
    """The calls of `wire/engine.proto`."""

    def __init__(self, config: WorkerConfig, engine: EngineThread, client: PrefillClient) -> None:
        self.config = config
        self.is_draining = False
        self._engine = engine
        self._client = client
        self._boot_epoch = secrets.randbits(64)
        self._snapshot: tuple[float, pb.StatusReply, bytes] | None = None
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._num_refusals = 0
        self._num_received_bytes = 0

    async def Generate(self, message: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - gRPC's name
        """See `engine.proto`."""
        try:
            self._check(message)
            request = self._request(message)
            await self._guide(request)
            received = Received()
            self._engine.engine.scheduler.check_admission(request.num_tokens)
            with _registered(self._running, request.request_id):
                if message.HasField("prefill"):
                    received = await self._client.fetch(request, message.salt, message.prefill.address)
                    self._num_refusals += received.is_refusal
                    self._num_received_bytes += received.num_bytes
                has_started = False
                async with self._engine.submit(request) as events:
                    async for event in events:
                        if event.token is None:
                            continue
                        if not has_started:
                            yield self._started(event.num_cached_tokens, received)
                            has_started = True
                        yield pb.GenerateEvent(token=_token(event.token))
                        if event.finish_reason is not None:
                            yield pb.GenerateEvent(finished=pb.Finished(reason=event.finish_reason.value))
        except ForeshoreError as error:
            await abort(context, error)

    async def Embed(self, message: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """See `engine.proto`."""
        try:
            self._check(message)
            engine = self._engine.engine
            request = Request(
                message.request_id,
                list(message.token_ids),
                engine.root(message.salt),
                priority=message.priority,
                pooling=engine.pooling,
            )
            with _registered(self._running, request.request_id):
                async with self._engine.submit(request) as events:
                    async for event in events:
                        if event.embedding is not None:
                            return _embed_reply(event.embedding, event.num_cached_tokens)
            raise UnavailableError(f"input {request.request_id!r} was cancelled", remedy="send it again")
        except ForeshoreError as error:
            return await abort(context, error)

    async def Prefill(self, message: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - gRPC's name
        """See `engine.proto`."""
        try:
            self._check(message)
            engine = self._engine.engine
            size = engine.pool.block_size
            if message.fingerprint != engine.fingerprint:
                raise InvalidInputError(
                    "the decode worker has another model, compute type or block layout",
                    remedy="start both workers with the same model, --dtype and --block-size",
                )
            if not message.token_ids or len(message.token_ids) % size:
                raise InvalidInputError(
                    f"{len(message.token_ids)} tokens are not whole blocks of {size}", remedy="send whole blocks"
                )
            request = Request(
                message.request_id,
                list(message.token_ids),
                engine.root(message.salt),
                priority=message.priority,
                is_prefill_only=True,
            )
            with _registered(self._running, request.request_id):
                async for event in self._send_blocks(request, message):
                    yield event
        except ForeshoreError as error:
            await abort(context, error)

    async def Status(self, message: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """See `engine.proto`. At most one snapshot per 0.2 s is taken from the engine."""
        try:
            check_version(message.protocol_version)
            now = time.monotonic()
            if self._snapshot is None or now - self._snapshot[0] > _SNAPSHOT_AGE_S:
                status, prefixes = await self._engine.call(self._take_snapshot)
                self._snapshot = (now, status, prefixes)
            reply = pb.StatusReply()
            reply.CopyFrom(self._snapshot[1])
            if message.known_prefix_version != reply.prefix_version:
                reply.prefixes = self._snapshot[2]
            return reply
        except ForeshoreError as error:
            return await abort(context, error)

    async def Abort(self, message: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        """See `engine.proto`."""
        try:
            check_version(message.protocol_version)
        except ForeshoreError as error:
            return await abort(context, error)
        task = self._running.get(message.request_id)
        if task is not None and not self._engine.end(message.request_id, _aborted(message.request_id)):
            task.cancel(_ABORTED)  # not in the engine yet: it fetches what another worker computed
        return pb.AbortReply(was_running=task is not None)

    async def _send_blocks(self, request: Request, message: Any) -> AsyncIterator[Any]:
        engine = self._engine.engine
        num_cached = 0
        async with self._engine.submit(request) as events:
            async for event in events:
                num_cached = event.num_cached_tokens
                for index, block in event.blocks:
                    if index >= message.num_held_blocks:
                        for first, count in split_layers(engine.kv.layout.num_layers, engine.kv.layout.bytes_per_layer):
                            data = await asyncio.to_thread(engine.kv.read_block, block, first, count)
                            part = make_part(
                                index, request.block_hashes[index], message.lease_epoch, first, count, data
                            )
                            yield pb.PrefillEvent(block=pb.KvBlock(**part.__dict__))
                    self._engine.post(_unparker(engine.scheduler, request.request_id, block))
        done = pb.PrefillDone(num_blocks=len(request.block_hashes), cached_tokens=num_cached)
        yield pb.PrefillEvent(done=done)

    def _check(self, message: Any) -> None:
        check_version(message.protocol_version)
        if self.is_draining:
            raise UnavailableError(f"worker {self.config.name} is shutting down", remedy="use another worker")
        if self._engine.failure is not None:
            raise UnavailableError(f"the engine has failed: {self._engine.failure!r}", remedy="use another worker")
        if not 0 < len(message.request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidInputError(
                f"request id of {len(message.request_id)} characters", remedy=f"use 1 to {MAX_REQUEST_ID_CHARS}"
            )
        if len(message.salt) > MAX_SALT_BYTES:
            raise InvalidInputError(f"salt of {len(message.salt)} bytes", remedy=f"use at most {MAX_SALT_BYTES}")
        if message.request_id in self._running:
            raise ConflictError(f"request id {message.request_id!r} is in use", remedy="use a fresh id per request")
        if any(token >= self._engine.engine.vocab_size for token in message.token_ids):
            raise InvalidInputError(
                f"a token id is not below the vocabulary size {self._engine.engine.vocab_size}",
                remedy="use this model's tokenizer",
            )

    def _request(self, message: Any) -> Request:
        num_prompt = message.num_prompt_tokens or len(message.token_ids)
        if num_prompt > len(message.token_ids):
            raise InvalidInputError(
                f"num_prompt_tokens is {num_prompt} of {len(message.token_ids)} tokens", remedy="count again"
            )
        return Request(
            message.request_id,
            list(message.token_ids),
            self._engine.engine.root(message.salt),
            _params(message.sampling),
            num_prompt_tokens=num_prompt,
            priority=message.priority,
        )

    async def _guide(self, request: Request) -> None:
        """Give a request with a schema its guide; compiling one can take long, so not on the loop."""
        if not request.params.json_schema:
            return
        guides = self._engine.engine.guides
        if guides is None:
            raise InvalidInputError("this worker cannot follow a JSON schema", remedy="leave response_format out")
        request.guide = await asyncio.to_thread(guides.make, request.params.json_schema)

    def _started(self, num_cached: int, received: Received) -> Any:
        size = self._engine.engine.pool.block_size
        return pb.GenerateEvent(
            started=pb.Started(
                cached_tokens=num_cached,
                received_tokens=min(received.num_blocks * size, num_cached),
                received_bytes=received.num_bytes,
                prefill_failure=received.failure,
                remote_cached_tokens=received.remote_cached_tokens,
            )
        )

    def _take_snapshot(self) -> tuple[Any, bytes]:
        engine = self._engine.engine
        scheduler, pool = engine.scheduler, engine.pool
        status = pb.StatusReply(
            worker=self.config.name,
            role=self.config.role,
            state="draining" if self.is_draining else "serving",
            boot_epoch=self._boot_epoch,
            fingerprint=engine.fingerprint,
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            max_context_tokens=scheduler.max_tokens,
            prefill_tokens_total=engine.num_prefill_tokens,
            output_tokens_total=engine.num_output_tokens,
            preemptions_total=scheduler.num_preemptions,
            evictions_total=pool.num_evictions,
            prefix_version=pool.version + 1,  # 0 is what a newcomer knows
            handoff_refusals_total=self._num_refusals,
            handoff_bytes_total=self._num_received_bytes,
            embedding_size=engine.embedding_size,
        )
        if engine.threads is not None:
            status.prefill_threads, status.decode_threads = engine.threads.prefill, engine.threads.decode
            status.threads_reason = engine.threads.reason
        return status, b"".join(name[:PREFIX_BYTES] for name in pool.names()[-MAX_REPORTED_PREFIXES:])


class WorkerServer:
    """Engine thread, peers and gRPC server of one worker."""

    def __init__(self, config: WorkerConfig, engine: EngineThread) -> None:
        self.engine = engine
        self._client = PrefillClient(engine, config.token)
        self.service = EngineService(config, engine, self._client)
        interceptors = [TokenInterceptor(config.token)] if config.token else []
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
        add_EngineServicer_to_server(self.service, self._server)  # type: ignore[no-untyped-call]

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises `UnavailableError` when the address is taken."""
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {host}:{port}", remedy="choose another port") from error
        self.engine.start()
        await self._server.start()
        return int(bound)

    async def drain(self, grace_s: float) -> None:
        """Refuse new work, let running answers finish for `grace_s`, then stop."""
        self.service.is_draining = True
        deadline = time.monotonic() + grace_s
        while self.engine.num_streams and time.monotonic() < deadline:  # noqa: ASYNC110 - streams end by themselves
            await asyncio.sleep(0.05)
        await self._server.stop(0.5)
        await self._client.close()
        await self.engine.stop()


class _registered:  # noqa: N801 - reads as a verb at its use
    """While the block runs, the current task is known under the request's id.

    A task that `Abort` cancelled leaves the block with `AbortedError`: a cancelled handler would answer nothing at all.
    """

    def __init__(self, tasks: dict[str, asyncio.Task[Any]], request_id: str) -> None:
        self._tasks = tasks
        self._request_id = request_id

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[self._request_id] = task

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        task = self._tasks.pop(self._request_id)
        if isinstance(error, asyncio.CancelledError) and error.args == (_ABORTED,):
            task.uncancel()
            raise _aborted(self._request_id) from None


def _aborted(request_id: str) -> AbortedError:
    return AbortedError(f"request {request_id!r} was aborted", remedy="send it again if it is wanted")


def _unparker(scheduler: Any, request_id: str, block: int) -> Callable[[], None]:
    return lambda: scheduler.unpark(request_id, [block])


def _params(sampling: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p or 1.0,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        seed=sampling.seed,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        num_logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        json_schema=sampling.json_schema,
    )


def _embed_reply(embedding: Embedding, num_cached_tokens: int) -> Any:
    if not np.isfinite(embedding.vector).all():
        raise InvalidInputError(
            "the model gives no finite vector for this input",
            remedy="run the worker with --dtype float32, or change the input",
            param="input",
        )
    return pb.EmbedReply(vector=embedding.vector.tolist(), cached_tokens=num_cached_tokens)


def _token(token: SampledToken) -> Any:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs]
    return pb.Token(token_id=token.token_id, logprob=token.logprob, top=top)
