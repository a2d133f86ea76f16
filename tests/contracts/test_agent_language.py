"""The language runtime on the device with a real model, through the official `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from edge_agent.trial import resident_bytes
from tests.fakes.agent_plane import AgentProcess, Plane
from tests.fakes.language_artefact import built_language_model

PROMPT, PARIS = [504, 3575, 282, 4649, 314], [7042]  # "The capital of France is", " Paris"
pytestmark = [pytest.mark.models, pytest.mark.slow]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    folder = built_language_model()
    tmp_path = tmp_path_factory.mktemp("agent")
    plane = Plane(tmp_path / "plane")
    plane.is_silent = True  # the content comes over HTTP, which is faster here than the small plane's MQTT
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        "name: test\ntargets: [cpu-x86]\nmemory_budget_bytes: 2000000000\nmax_context_tokens: 512\nfetch_stall_s: 0.3\n"
    )
    agent = AgentProcess(tmp_path / "home")
    try:
        agent.enrol(plane.url, str(profile))
        agent.start()
        golden = {"cases": [{"prompt_tokens": PROMPT, "tokens": PARIS}]}
        wish = plane.publish_language(folder, "1.0.0", json.dumps(golden).encode())
        plane.wish(wish)
        done = plane.await_model(lambda m: m.get("result") is not None, 120, "chat")
        assert done["result"] in {"succeeded"}, done
        yield agent
    finally:
        agent.stop()
        plane.close()


def test_the_official_client_streams_and_gets_its_own_errors(agent: AgentProcess) -> None:
    with openai.OpenAI(base_url=f"{agent.url}/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        asked = {"model": "chat", "messages": messages, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        assert "Paris" in whole.choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        cut = client.completions.create(
            model="chat", prompt="One, two, three,", max_tokens=24, temperature=0, stop=["six"]
        )
        assert "six" not in cut.choices[0].text
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**asked, "max_tokens": 4000})
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**{**asked, "model": "absent"})


def test_every_answer_says_where_and_why(agent: AgentProcess) -> None:
    body = {"model": "chat", "prompt": "Hello", "max_tokens": 4, "temperature": 0.8, "seed": 7}
    answers = [httpx.post(f"{agent.url}/v1/completions", json=body, timeout=60) for _ in range(2)]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    assert answers[0].headers["x-foreshore-location"] == "device"
    assert "no gateway" in answers[0].headers["x-foreshore-reason"]
    record = httpx.get(f"{agent.url}/decisions/{answers[0].headers['x-foreshore-decision']}").json()
    assert record["chosen"] == "device"
    assert record["actual"]["tokens"] == 4.0


def test_the_whole_agent_stays_within_twice_the_artefact_and_200_mb(agent: AgentProcess) -> None:
    """Also when it has answered with JSON, for which the vocabulary is indexed."""
    body = {"model": "chat", "prompt": "word " * 400, "max_tokens": 8, "temperature": 0}
    for more in ({}, {"response_format": {"type": "json_object"}}):
        assert httpx.post(f"{agent.url}/v1/completions", json=body | more, timeout=120).status_code == 200
    artefact_bytes = sum(path.stat().st_size for path in built_language_model().iterdir())
    assert resident_bytes(agent.pid, "VmRSS") <= 2 * artefact_bytes + 200 * 1024 * 1024


def test_json_is_followed_and_embeddings_are_refused_by_a_model_without_hidden_states(agent: AgentProcess) -> None:
    with openai.OpenAI(base_url=f"{agent.url}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "chat", "messages": [{"role": "user", "content": "Invent a person."}], "max_tokens": 40}
        schema = {
            "type": "object",
            "properties": {"age": {"type": "integer", "maximum": 120}},
            "required": ["age"],
            "additionalProperties": False,
        }
        kind = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
        answer = client.chat.completions.create(**asked, temperature=0, response_format=kind)
        assert set(json.loads(answer.choices[0].message.content)) == {"age"}
        with pytest.raises(openai.BadRequestError, match="no schema to follow"):
            client.chat.completions.create(**asked, response_format={"type": "xml"})
        with pytest.raises(openai.BadRequestError, match="hidden states"):
            client.embeddings.create(model="chat", input="a text")
