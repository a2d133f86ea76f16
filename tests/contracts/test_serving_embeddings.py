"""The call `Embed` over real gRPC, and the gateway's way through workers that fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import grpc

from cloud.gateway.decisions import DecisionLog
from cloud.gateway.fleet import Fleet, WorkerSpec
from cloud.gateway.vectors import EmbeddingJob, Vectors
from cloud.serving.engine import Engine, EngineConfig, build_engine
from cloud.serving.request import Request
from cloud.serving.rpc import credentials_metadata, engine_stub, error_from
from tests.fakes.serving_models import SHAPE, save_tiny_model
from tests.fakes.serving_workers import BLOCK_SIZE, generate_request, running_worker
from wire import engine_pb2 as pb
from wire.errors import (
    ForeshoreError,
    InvalidInputError,
    NotAuthenticatedError,
    UnavailableError,
    UnknownVersionError,
)

INPUTS = [[7, 9, 30, 44, 5] * 12, [3], [8, 1, 4] * 30, [250, 251]]
NUM_BLOCKS = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "llama")
    (folder / "1_Pooling").mkdir()  # the last token's state may come after cached blocks, a mean may not
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    return folder


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[Any]:
    """What an engine gives for the inputs."""
    engine: Engine = build_engine(EngineConfig(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE))
    requests = [Request(f"r{i}", list(x), engine.root(b"t"), pooling=engine.pooling) for i, x in enumerate(INPUTS)]
    return engine.embed(requests)


def embed_request(request_id: str, token_ids: list[int], **options: Any) -> Any:
    fields = {"protocol_version": 1, "salt": b"tenant", **options}
    return pb.EmbedRequest(request_id=request_id, token_ids=token_ids, **fields)


async def num_free_blocks(server: Any) -> int:
    def look() -> int:
        server.engine.engine.scheduler.check_integrity()
        return server.engine.engine.pool.num_free

    return await server.engine.call(look)


async def wait_until_idle(server: Any) -> None:
    for _ in range(400):
        if await num_free_blocks(server) == NUM_BLOCKS and not server.engine.engine.has_work:
            return
        await asyncio.sleep(0.05)
    pytest.fail("blocks are still in use")


def close_to(got: list[Any], wanted: list[Any]) -> bool:
    return all(np.abs(np.array(a) - b).max() < 2e-6 for a, b in zip(got, wanted, strict=True))


def test_a_worker_gives_the_engines_vectors_beside_answers(model: Path, wanted: list[Any]) -> None:
    async def run() -> None:
        async with running_worker(model, "both") as (address, server), grpc.aio.insecure_channel(address) as channel:
            stub = engine_stub(channel)
            answers = [stub.Generate(generate_request(f"g{i}", tokens), timeout=60) for i, tokens in enumerate(INPUTS)]
            events = [asyncio.create_task(_read_all(answer)) for answer in answers]
            calls = [stub.Embed(embed_request(f"e{i}", tokens), timeout=60) for i, tokens in enumerate(INPUTS)]
            assert close_to([(await call).vector for call in calls], wanted)
            assert [len(tokens) for tokens in await asyncio.gather(*events)] == [16] * len(INPUTS)
            again = await stub.Embed(embed_request("again", INPUTS[0]), timeout=60)
            assert again.cached_tokens == 56
            assert close_to([again.vector], wanted[:1])
            status = await stub.Status(pb.StatusRequest(protocol_version=1), timeout=10)
            assert status.embedding_size == SHAPE["hidden_size"]
            await wait_until_idle(server)

    asyncio.run(run())


async def _read_all(call: Any) -> list[int]:
    return [event.token.token_id async for event in call if event.HasField("token")]


def test_bad_requests_are_refused_with_the_value_and_the_remedy(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "both") as (address, server), grpc.aio.insecure_channel(address) as channel:
            cases: list[tuple[Any, type[ForeshoreError], str]] = [
                (embed_request("a", [1], protocol_version=9), UnknownVersionError, "version 9"),
                (embed_request("", [1]), InvalidInputError, "0 characters"),
                (embed_request("b", []), InvalidInputError, "no tokens"),
                (embed_request("c", [999]), InvalidInputError, "vocabulary size 300"),
                (embed_request("d", [1] * 513), InvalidInputError, "513 tokens and the context holds 512"),
            ]
            for request, error_type, text in cases:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await engine_stub(channel).Embed(request, timeout=30)
                error = error_from(caught.value)
                assert type(error) is error_type
                assert text in error.message
                assert error.remedy
            assert len((await engine_stub(channel).Embed(embed_request("e", [1] * 512), timeout=60)).vector) == 48
            await wait_until_idle(server)

    asyncio.run(run())


def test_a_worker_with_a_token_refuses_everyone_else(model: Path) -> None:
    async def run() -> None:
        async with (
            running_worker(model, "both", token="secret") as (address, _),
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = engine_stub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Embed(embed_request("a", [1]), metadata=credentials_metadata("wrong"), timeout=30)
            assert type(error_from(caught.value)) is NotAuthenticatedError
            reply = await stub.Embed(embed_request("b", [1]), metadata=credentials_metadata("secret"), timeout=60)
            assert len(reply.vector) == 48

    asyncio.run(run())


def test_a_client_that_leaves_and_an_abort_free_every_block(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "both") as (address, server), grpc.aio.insecure_channel(address) as channel:
            stub = engine_stub(channel)
            calls = [stub.Embed(embed_request(f"r{i}", [i + 3] * 500), timeout=60) for i in range(6)]
            await asyncio.sleep(0.1)
            for call in calls[:4]:
                call.cancel()
            for index in (4, 5):
                await stub.Abort(pb.AbortRequest(protocol_version=1, request_id=f"r{index}"), timeout=30)
            ended = await asyncio.gather(*calls, return_exceptions=True)
            codes = [error.code() for error in ended if isinstance(error, grpc.aio.AioRpcError)]
            assert codes == [grpc.StatusCode.CANCELLED] * len(codes), "an aborted call is answered at once"
            await wait_until_idle(server)
            assert len((await stub.Embed(embed_request("after", [5]), timeout=60)).vector) == 48

    asyncio.run(run())


def job_of(inputs: list[list[int]]) -> EmbeddingJob:
    return EmbeddingJob(inputs, b"salt", "tenant", "tiny")


def test_inputs_without_a_vector_go_on_to_the_next_worker_when_one_is_gone(model: Path, wanted: list[Any]) -> None:
    async def run() -> None:
        async with running_worker(model, "prefill") as (p, dying), running_worker(model, "decode") as (d, living):
            fleet = Fleet([WorkerSpec("p", "prefill", p), WorkerSpec("d", "decode", d)])
            log = DecisionLog()
            await asyncio.gather(*(link.poll() for link in fleet.links.values()))
            many = [INPUTS[index % len(INPUTS)] for index in range(40)]
            vectors = Vectors(job_of(many), fleet, log)
            assert close_to(await vectors.run(), [wanted[index % len(INPUTS)] for index in range(40)])
            assert vectors.outcome.prefill_worker == "p", "a prefill worker's work; 8 may wait there"
            await dying.drain(0)
            vectors = Vectors(job_of(INPUTS), fleet, log)
            assert close_to(await vectors.run(), wanted)
            assert (vectors.outcome.prefill_worker, vectors.outcome.num_failovers) == ("d", 1)
            record = log.get("tenant", vectors.outcome.decision.decision_id)  # type: ignore[union-attr]
            assert record["chosen"] == "d"
            assert record["actual"]["input_tokens"] == sum(map(len, INPUTS))
            await fleet.close()
            await wait_until_idle(living)

    asyncio.run(run())


def test_a_worker_older_than_the_call_is_not_asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.gateway.vectors.START_PATIENCE_S", 0.2)

    async def run() -> None:
        async with running_worker(model, "both") as (address, _):
            fleet = Fleet([WorkerSpec("old", "both", address)])
            link = fleet.links["old"]
            await link.poll()
            link.status.embedding_size = 0
            with pytest.raises(UnavailableError, match="cannot embed"):
                await Vectors(job_of([[1, 2]]), fleet, DecisionLog()).run()
            assert not link.view().unfit, "it stays fit for answers"
            await fleet.close()

    asyncio.run(run())


def test_a_long_input_is_refused_before_a_worker_is_asked(model: Path) -> None:
    async def run() -> None:
        async with running_worker(model, "both") as (address, _):
            fleet = Fleet([WorkerSpec("w", "both", address)])
            await fleet.links["w"].poll()
            with pytest.raises(InvalidInputError, match="input 1 has 513 tokens and the context holds 512") as caught:
                await Vectors(job_of([[1], [2] * 513]), fleet, DecisionLog()).run()
            assert caught.value.details["reason"] == "context_length_exceeded"
            await fleet.close()

    asyncio.run(run())
