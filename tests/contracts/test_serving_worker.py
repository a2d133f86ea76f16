"""Workers over real gRPC: monolithic, and prefill plus decode, with every fault a hand-off can have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import grpc
import torch

import cloud.serving.worker as worker_module
from cloud.serving.cpu_threads import measure
from cloud.serving.engine import EngineConfig, build_engine
from cloud.serving.engine_thread import EngineThread
from cloud.serving.handoff import Part, make_part
from cloud.serving.probe import probe_steps
from cloud.serving.rpc import OPTIONS, credentials_metadata, engine_stub, error_from
from cloud.serving.worker import WorkerConfig, WorkerServer
from tests.fakes.serving_models import save_tiny_model
from tests.fakes.serving_workers import BLOCK_SIZE, generate_request, running_worker
from wire import engine_pb2 as pb
from wire.errors import InvalidInputError, NotAuthenticatedError, UnknownVersionError

PROMPT = [7, 9, 30, 44, 5] * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama")


async def collect(address: str, request: Any, token: str | None = None) -> tuple[list[int], Any, str]:
    """Tokens, the started event and the finish reason of one answer."""
    tokens: list[int] = []
    started, reason = None, ""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        async for event in engine_stub(channel).Generate(request, metadata=credentials_metadata(token), timeout=60):
            if event.HasField("token"):
                tokens.append(event.token.token_id)
            elif event.HasField("started"):
                started = event.started
            else:
                reason = event.finished.reason
    return tokens, started, reason


async def read_all(answer: Any) -> None:
    while await answer.read() is not grpc.aio.EOF:
        pass


async def num_free_blocks(server: WorkerServer) -> int:
    """Free blocks once everything that was posted before has run; also checks the books."""

    def look() -> int:
        server.engine.engine.scheduler.check_integrity()
        return server.engine.engine.pool.num_free

    return await server.engine.call(look)


def test_prefill_and_decode_give_the_monolithic_answer_and_share_their_caches(model: Path) -> None:
    async def run() -> None:
        async with (
            running_worker(model, "both") as (alone, _),
            running_worker(model, "prefill") as (prefill, p),
            running_worker(model, "decode") as (decode, d),
        ):
            expected, _, _ = await collect(alone, generate_request("m", PROMPT))
            source = pb.PrefillSource(worker="p", address=prefill)
            tokens, started, reason = await collect(decode, generate_request("a", PROMPT, prefill=source))
            assert (tokens, reason) == (expected, "length")
            assert started.received_tokens == started.cached_tokens == 56
            assert started.received_bytes == 7 * p.engine.engine.kv.layout.bytes_per_block
            again, started, _ = await collect(decode, generate_request("b", PROMPT, prefill=source))
            assert (again, started.received_tokens, started.cached_tokens) == (expected, 0, 56)
            longer = PROMPT + [3] * 20
            tokens, started, _ = await collect(decode, generate_request("c", longer, prefill=source))
            assert tokens == (await collect(alone, generate_request("n", longer)))[0]
            assert started.received_tokens == 16, "blocks that the decode worker holds are not sent"
            assert started.remote_cached_tokens == 56
            for server in (p, d):
                assert await num_free_blocks(server) == 128

    asyncio.run(run())


FAULTS: dict[str, Callable[[Part], Part | None]] = {
    "truncated payload": lambda p: replace(p, payload=p.payload[:-4]),
    "flipped bit": lambda p: replace(p, payload=p.payload[:-1] + bytes([p.payload[-1] ^ 1])),
    "stale epoch": lambda p: make_part(
        p.index, p.block_hash, p.lease_epoch ^ 1, p.first_layer, p.num_layers, p.payload
    ),
    "swapped place": lambda p: replace(p, index=p.index + 1),
    "other tokens": lambda p: make_part(p.index, bytes(32), p.lease_epoch, p.first_layer, p.num_layers, p.payload),
    "missing part": lambda p: None,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at_block", [0, 3])
def test_a_damaged_hand_off_is_refused_and_computed_again(
    fault: str, at_block: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker_module.EngineService._send_blocks

    async def damaged(self: Any, request: Any, message: Any) -> AsyncIterator[Any]:
        async for event in real(self, request, message):
            if event.HasField("block") and event.block.index == at_block:
                part = FAULTS[fault](Part(**{n: getattr(event.block, n) for n in Part.__dataclass_fields__}))
                if part is None:
                    continue
                yield pb.PrefillEvent(block=pb.KvBlock(**part.__dict__))
            else:
                yield event

    async def run() -> None:
        async with (
            running_worker(model, "both") as (alone, _),
            running_worker(model, "prefill") as (prefill, p),
            running_worker(model, "decode") as (decode, d),
        ):
            expected, _, _ = await collect(alone, generate_request("m", PROMPT))
            monkeypatch.setattr(worker_module.EngineService, "_send_blocks", damaged)
            request = generate_request("a", PROMPT, prefill=pb.PrefillSource(worker="p", address=prefill))
            tokens, started, _ = await collect(decode, request)
            assert tokens == expected
            assert started.prefill_failure.startswith("integrity")
            assert started.received_tokens == at_block * BLOCK_SIZE, "only what was right is kept"
            tokens, started, _ = await collect(decode, generate_request("b", PROMPT))
            assert tokens == expected, "nothing wrong stays in the cache"
            for server in (p, d):
                assert await num_free_blocks(server) == 128

    asyncio.run(run())


def test_a_dead_prefill_worker_costs_time_only(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "decode") as (decode, _):
            expected, _, _ = await collect(decode, generate_request("m", PROMPT, salt=b"other"))
            source = pb.PrefillSource(worker="p", address="127.0.0.1:9")
            tokens, started, _ = await collect(decode, generate_request("a", PROMPT, prefill=source))
            assert tokens == expected
            assert started.prefill_failure.startswith("unavailable")

    asyncio.run(run())


def test_a_client_that_leaves_frees_every_block(model: Path) -> None:
    async def run() -> None:
        async with (
            running_worker(model, "prefill") as (prefill, p),
            running_worker(model, "decode") as (decode, d),
            grpc.aio.insecure_channel(decode) as channel,
        ):
            source = pb.PrefillSource(worker="p", address=prefill)
            for index in range(6):
                request = generate_request(f"r{index}", [index, *PROMPT], max_tokens=400, prefill=source)
                call = engine_stub(channel).Generate(request, timeout=60)
                for _ in range(index // 2):
                    await call.read()
                call.cancel()
            for server in (p, d):
                for _ in range(200):
                    if await num_free_blocks(server) == 128 and not server.engine.engine.scheduler.has_work:
                        break
                    await asyncio.sleep(0.05)
                assert await num_free_blocks(server) == 128

    asyncio.run(run())


def test_an_aborted_answer_ends_with_a_status_and_frees_every_block(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "both") as (address, server), grpc.aio.insecure_channel(address) as channel:
            stub = engine_stub(channel)
            answer = stub.Generate(generate_request("long", PROMPT, max_tokens=400))
            assert (await answer.read()).HasField("started")
            aborted = await stub.Abort(pb.AbortRequest(protocol_version=1, request_id="long"), timeout=30)
            assert aborted.was_running
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await read_all(answer)
            assert ended.value.code() is grpc.StatusCode.CANCELLED
            unknown = await stub.Abort(pb.AbortRequest(protocol_version=1, request_id="nobody"), timeout=30)
            assert not unknown.was_running
            assert await num_free_blocks(server) == 128

    asyncio.run(run())


def test_an_answer_that_waits_for_its_prefill_is_aborted_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stalled(*_: Any) -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        monkeypatch.setattr(worker_module.PrefillClient, "fetch", stalled)
        async with running_worker(model, "decode") as (address, _), grpc.aio.insecure_channel(address) as channel:
            stub = engine_stub(channel)
            source = pb.PrefillSource(worker="p", address="127.0.0.1:9")
            answer = stub.Generate(generate_request("early", PROMPT, prefill=source))
            await asyncio.sleep(0.3)
            aborted = await stub.Abort(pb.AbortRequest(protocol_version=1, request_id="early"), timeout=30)
            assert aborted.was_running
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await answer.read()
            assert ended.value.code() is grpc.StatusCode.CANCELLED

    asyncio.run(run())


def test_a_resumed_sequence_continues_a_seeded_draw(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "both") as (address, _):
            options = {"temperature": 1.0, "top_p": 0.9, "seed": 11, "presence_penalty": 0.5}
            whole, _, _ = await collect(address, generate_request("a", PROMPT, **options))
            resumed = generate_request("b", PROMPT + whole[:6], num_prompt_tokens=len(PROMPT), **options)
            assert (await collect(address, resumed))[0] == whole[6:]

    asyncio.run(run())


def test_bad_requests_are_refused_with_the_value_and_the_remedy(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "both") as (address, _):
            cases = [
                (generate_request("a", [1], protocol_version=9), UnknownVersionError, "version 9"),
                (generate_request("", [1]), InvalidInputError, "0 characters"),
                (generate_request("b", []), InvalidInputError, "no tokens"),
                (generate_request("c", [999]), InvalidInputError, "vocabulary size 300"),
                (generate_request("d", [1] * 600), InvalidInputError, "600 tokens"),
                (generate_request("e", [1], temperature=9.0), InvalidInputError, "temperature is 9"),
            ]
            for request, error_type, text in cases:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await collect(address, request)
                error = error_from(caught.value)
                assert type(error) is error_type
                assert text in error.message
                assert error.remedy

    asyncio.run(run())


def test_a_worker_with_a_token_refuses_everyone_else(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "both", token="secret") as (address, _):
            for token in (None, "wrong"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await collect(address, generate_request("a", [1, 2]), token)
                assert type(error_from(caught.value)) is NotAuthenticatedError
            assert len((await collect(address, generate_request("b", [1, 2]), "secret"))[0]) == 16

    asyncio.run(run())


def test_the_status_reports_load_and_cached_prefixes_once(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "both", name="w1") as (address, server):
            await collect(address, generate_request("a", PROMPT))
            async with grpc.aio.insecure_channel(address) as channel:
                stub = engine_stub(channel)
                await asyncio.sleep(0.3)
                reply = await stub.Status(pb.StatusRequest(protocol_version=1), timeout=10)
                assert (reply.worker, reply.role, reply.state) == ("w1", "both", "serving")
                assert len(reply.prefixes) == 8 * len(server.engine.engine.pool.names())
                same = await stub.Status(
                    pb.StatusRequest(protocol_version=1, known_prefix_version=reply.prefix_version), timeout=10
                )
                assert not same.prefixes

    asyncio.run(run())


def test_the_status_tells_the_threads_that_were_measured(model: Path) -> None:
    engine = build_engine(EngineConfig(model, num_blocks=32, block_size=8))
    before = torch.get_num_threads()
    engine.threads = measure(*probe_steps(engine), 2, time.perf_counter)

    async def run() -> None:
        server = WorkerServer(WorkerConfig("w1"), EngineThread(engine))
        port = await server.start("127.0.0.1", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            tokens = await collect(f"127.0.0.1:{port}", generate_request("a", PROMPT))
            reply = await engine_stub(channel).Status(pb.StatusRequest(protocol_version=1), timeout=10)
        await server.drain(0)
        assert tokens
        assert {reply.prefill_threads, reply.decode_threads} <= {1, 2}
        assert reply.threads_reason.startswith(f"prefill: {reply.prefill_threads} threads (1: ")

    try:
        asyncio.run(run())
    finally:
        torch.set_num_threads(before)
