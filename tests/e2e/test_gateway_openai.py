"""The official openai client against the gateway, with prefill and decode workers as processes, some of them killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")
openai = pytest.importorskip("openai")

from cloud.serving.engine import Engine, EngineConfig, build_engine  # noqa: E402
from cloud.serving.request import Request, SamplingParams  # noqa: E402
from model_registry.chat_tokenizer import ChatTokenizer  # noqa: E402
from tests.fakes.serving_gateway import TOKEN, GatewayProcess  # noqa: E402
from tests.fakes.serving_models import save_tiny_model, save_tiny_tokenizer  # noqa: E402
from tests.fakes.serving_workers import BLOCK_SIZE, WorkerProcess, wait_until  # noqa: E402

MESSAGES: Any = [{"role": "user", "content": "Where does the land meet the sea? " * 3}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return build_engine(EngineConfig(model, num_blocks=128, block_size=BLOCK_SIZE))


@pytest.fixture(scope="module")
def tier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    workers = {role: WorkerProcess(model, role) for role in ("prefill", "decode")}
    gateway = GatewayProcess(tmp_path_factory.mktemp("gateway"), {n: (n, w.address) for n, w in workers.items()}, model)
    gateway.wait_for_workers(2)
    yield gateway
    assert gateway.stop() == 0
    for worker in workers.values():
        assert worker.kill(signal.SIGTERM) == 0, "a worker drains and ends with 0"


@pytest.fixture
def client(tier: GatewayProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{tier.url}/v1", api_key=TOKEN, max_retries=0, timeout=60) as opened:
        yield opened


def expected_text(engine: Engine, model: Path, messages: Any, count: int, **options: Any) -> str:
    """What an undisturbed engine answers."""
    tokenizer = ChatTokenizer(model)
    params = SamplingParams(max_tokens=count, ignore_eos=True, **options)
    request = Request(f"e{id(options)}", tokenizer.encode_chat(messages), engine.root(b"x"), params)
    engine.pool.clear_names()
    (tokens,) = engine.generate([request])
    return tokenizer.decode(tokens)


def test_a_chat_goes_through_prefill_and_decode_and_reuses_its_prefix(
    client: Any, tier: GatewayProcess, engine: Engine, model: Path
) -> None:
    extra = {"ignore_eos": True}
    expected = expected_text(engine, model, MESSAGES, 20)
    first = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, extra_body=extra
    )
    assert first.choices[0].message.content == expected
    assert (first.choices[0].finish_reason, first.usage.completion_tokens) == ("length", 20)
    served = first.foreshore
    assert (served["prefill_worker"], served["decode_worker"]) == ("prefill", "decode")
    assert served["kv_bytes_moved"] > 0
    assert first.usage.prompt_tokens_details.cached_tokens == 0

    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 80, "the prompt was not computed again"
    assert chunks[-1].foreshore["kv_bytes_moved"] == 0
    decision = httpx.get(
        f"{tier.url}/decisions/{served['decision_id']}", headers={"authorization": f"Bearer {TOKEN}"}
    ).json()
    assert decision["chosen"] == "prefill > decode"
    assert decision["actual"]["ttft_ms"] > 0


def test_completions_choices_stops_and_logprobs(client: Any, engine: Engine, model: Path) -> None:
    extra = {"ignore_eos": True}
    whole = client.completions.create(model="tiny", prompt="The sea", max_tokens=30, temperature=0, extra_body=extra)
    text = whole.choices[0].text
    stop = text[5:7]
    stopped = client.completions.create(
        model="tiny", prompt="The sea", max_tokens=30, temperature=0, stop=[stop], extra_body=extra
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    several = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=8,
        n=3,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        extra_body=extra,
    )
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert len({c.message.content for c in several.choices}) > 1
    content = several.choices[0].logprobs.content
    assert len(content) == 8
    assert len(content[0].top_logprobs) == 2
    again = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, seed=5, extra_body=extra)
    assert again.choices[0].message.content == several.choices[0].message.content


def test_errors_arrive_as_the_clients_own_types(client: Any, tier: GatewayProcess) -> None:
    def ask(**options: Any) -> None:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **options})

    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(model="nobody")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(temperature=9)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        ask(tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError) as caught:
        ask(messages=[{"role": "user", "content": "x" * 3000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{tier.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.post(f"{tier.url}/v1/chat/completions", json={}).status_code == 401
    assert httpx.get(f"{tier.url}/decisions/x").status_code == 401
    assert client.models.list().data[0].id == "tiny"


def test_a_client_that_leaves_ends_the_work_on_the_worker(client: Any, tier: GatewayProcess) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=350, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()

    def is_idle() -> bool:
        lines = httpx.get(f"{tier.url}/metrics").text.splitlines()
        return 'foreshore_num_requests_running{worker="decode"} 0.0' in lines

    wait_until(is_idle)


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "seed": 3, "presence_penalty": 0.4}])
def test_killing_a_worker_in_mid_stream_changes_nothing_in_the_answer(
    victim: str, sampling: dict[str, Any], model: Path, engine: Engine, tmp_path: Path
) -> None:
    count = 150
    expected = expected_text(engine, model, MESSAGES, count, **sampling)
    workers = {role: WorkerProcess(model, role) for role in ("prefill", "decode")}
    gateway = GatewayProcess(tmp_path, {n: (n, w.address) for n, w in workers.items()}, model)
    try:
        gateway.wait_for_workers(2)
        body = {
            "model": "tiny",
            "messages": MESSAGES,
            "max_tokens": count,
            "stream": True,
            "ignore_eos": True,
            **sampling,
        }
        text, served = "", {}
        headers = {"authorization": f"Bearer {TOKEN}"}
        with httpx.stream(
            "POST", f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=120
        ) as response:
            lines = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
            for number, line in enumerate(lines):
                if line == "[DONE]":
                    break
                if number == 5:
                    workers[victim].kill(signal.SIGKILL)
                chunk = json.loads(line)
                text += chunk["choices"][0]["delta"].get("content") or ""
                served = chunk.get("foreshore", served)
            else:
                pytest.fail("the stream ended without [DONE]")
        assert text == expected
        assert served["failovers"] == (1 if victim == "decode" else 0)
    finally:
        gateway.stop()
        for worker in workers.values():
            worker.stop()
