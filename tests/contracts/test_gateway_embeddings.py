"""`/v1/embeddings` of the gateway with the official openai client, before a real worker process."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("torch")
openai = pytest.importorskip("openai")

from cloud.serving.engine import Engine, EngineConfig, build_engine  # noqa: E402
from cloud.serving.request import Request  # noqa: E402
from model_registry.chat_tokenizer import ChatTokenizer  # noqa: E402
from tests.fakes.serving_gateway import TOKEN, GatewayProcess  # noqa: E402
from tests.fakes.serving_models import save_tiny_model, save_tiny_tokenizer  # noqa: E402
from tests.fakes.serving_workers import BLOCK_SIZE, WorkerProcess, wait_until  # noqa: E402

TEXTS = ["Where does the land meet the sea?", "tide", "ebb and flow " * 20]
HEADERS = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[list[int]]:
    return [ChatTokenizer(model).encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def wanted(model: Path, tokens: list[list[int]]) -> list[Any]:
    """What an engine gives for the texts."""
    engine: Engine = build_engine(EngineConfig(model, num_blocks=128, block_size=BLOCK_SIZE))
    requests = [Request(f"r{i}", list(x), engine.root(b"t"), pooling=engine.pooling) for i, x in enumerate(tokens)]
    return engine.embed(requests)


@pytest.fixture(scope="module")
def tier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    worker = WorkerProcess(model, "both")
    gateway = GatewayProcess(tmp_path_factory.mktemp("gateway"), {"w": ("both", worker.address)}, model)
    try:
        gateway.wait_for_workers(1)
        yield gateway
    finally:
        gateway.stop()
        worker.stop()


@pytest.fixture
def client(tier: GatewayProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{tier.url}/v1", api_key=TOKEN, max_retries=0, timeout=120) as opened:
        yield opened


def assert_close(data: Any, wanted: list[Any]) -> None:
    assert [item.index for item in data] == list(range(len(wanted)))
    for item, vector in zip(data, wanted, strict=True):
        assert np.abs(np.array(item.embedding) - vector).max() < 2e-6


def test_every_shape_of_input_gives_the_engines_vectors(
    client: Any, tokens: list[list[int]], wanted: list[Any]
) -> None:
    num_tokens = [len(one) for one in tokens]
    for given, vectors, count in (
        (TEXTS[0], wanted[:1], num_tokens[0]),
        (TEXTS, wanted, sum(num_tokens)),
        (tokens[0], wanted[:1], num_tokens[0]),
        (tokens, wanted, sum(num_tokens)),
        (TEXTS * 20, wanted * 20, 20 * sum(num_tokens)),
    ):
        answer = client.embeddings.create(model="tiny", input=given)
        assert (answer.object, answer.model) == ("list", "tiny")
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)
        assert_close(answer.data, vectors)


def test_floats_and_base64_are_the_same_numbers(client: Any, tier: GatewayProcess, wanted: list[Any]) -> None:
    assert_close(client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float").data, wanted)
    answers = []
    for encoding in ("float", "base64"):
        body = {"model": "tiny", "input": TEXTS[1], "encoding_format": encoding}
        answer = httpx.post(f"{tier.url}/v1/embeddings", json=body, headers=HEADERS, timeout=60)
        answers.append(answer.json()["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(base64.b64decode(answers[1]), "<f4"), np.array(answers[0], np.float32))


def test_an_answer_tells_where_and_why(tier: GatewayProcess) -> None:
    body = {"model": "tiny", "input": TEXTS, "user": "ignored"}
    headers = {**HEADERS, "x-foreshore-decision": "parent-1"}
    answer = httpx.post(f"{tier.url}/v1/embeddings", json=body, headers=headers, timeout=60)
    served = answer.json()["foreshore"]
    assert served["prefill_worker"] == "w"
    assert answer.headers["x-foreshore-location"] == "cloud"
    assert answer.headers["x-foreshore-decision"] == served["decision_id"]
    record = httpx.get(f"{tier.url}/decisions/{served['decision_id']}", headers=HEADERS).json()
    assert (record["chosen"], record["parent_id"]) == ("w", "parent-1")
    assert record["actual"]["input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    metrics = httpx.get(f"{tier.url}/metrics").text
    assert 'foreshore_gateway_requests_total{route="embedding",status="200"}' in metrics


def test_errors_name_the_value_and_arrive_as_the_clients_own_types(client: Any) -> None:
    for given, text in (
        ("", "input is empty"),
        ([], "empty list"),
        (["a", ""], "input 1 is empty"),
        ([[1], []], "input 1 is empty"),
        (["a", [1]], "mixes texts and token ids"),
        ([1, -2], "holds '-2'"),
        ([[1], [2.5]], "input 1 holds '2.5'"),
        ([1, None], "holds 'None'"),
        ([999], "vocabulary size 300"),
        ({"a": 1}, "input is dict"),
        ([{"a": 1}], "input 0 is dict"),
        (["a"] * 2049, "2049 inputs"),
    ):
        with pytest.raises(openai.BadRequestError, match=text) as caught:
            client.embeddings.create(model="tiny", input=given)
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="dimensions is 16") as caught:
        client.embeddings.create(model="tiny", input="a", dimensions=16)
    assert caught.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError, match="encoding_format"):
        client.embeddings.create(model="tiny", input="a", encoding_format="hex")
    with pytest.raises(openai.BadRequestError, match="input 1 has 600 tokens and the context holds 512") as caught:
        client.embeddings.create(model="tiny", input=["a", "x" * 600])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist") as caught:
        client.embeddings.create(model="nobody", input="a")
    assert caught.value.code == "model_not_found"


def test_nobody_is_served_without_a_token(tier: GatewayProcess) -> None:
    assert httpx.post(f"{tier.url}/v1/embeddings", json={"model": "tiny", "input": "a"}).status_code == 401
    with (
        openai.OpenAI(base_url=f"{tier.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.embeddings.create(model="tiny", input="a")


def test_a_client_that_leaves_ends_the_work_on_the_worker(tier: GatewayProcess) -> None:
    body = {"model": "tiny", "input": [[index % 200 + 3] * 500 for index in range(400)]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tier.url}/v1/embeddings", json=body, headers=HEADERS, timeout=1.0)

    def is_idle() -> bool:
        lines = httpx.get(f"{tier.url}/metrics", timeout=30).text.splitlines()
        begun = any(line.startswith('foreshore_gateway_requests_total{route="embedding",status="5') for line in lines)
        idle = {'foreshore_num_requests_running{worker="w"} 0.0', 'foreshore_num_requests_waiting{worker="w"} 0.0'}
        return begun and idle <= set(lines)

    wait_until(is_idle)
