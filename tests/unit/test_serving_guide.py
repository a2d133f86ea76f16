"""Answers under a JSON schema: valid whatever the model prefers, the same when resumed, and refusals that say why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("llguidance")

from cloud.gateway.schemas import parse_chat
from cloud.serving.engine import Engine, EngineConfig, build_engine
from cloud.serving.request import FinishReason, Request, SamplingParams
from tests.fakes.serving_models import save_tiny_model, save_tiny_tokenizer
from wire.errors import InvalidInputError

SCHEMA = json.dumps({"type": "array", "items": {"enum": ["sea", "land"]}, "minItems": 2, "maxItems": 2})
FIRST_BYTE_ID = 3  # of the tiny tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = save_tiny_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))
    return build_engine(EngineConfig(folder, num_blocks=64, block_size=8))


def request(engine: Engine, name: str, output: tuple[int, ...] = (), **params: float) -> Request:
    assert engine.guides is not None
    wanted = SamplingParams(max_tokens=80, json_schema=SCHEMA, **params)  # type: ignore[arg-type]
    tokens = [5, 9, 11, *output]
    guide = engine.guides.make(SCHEMA)
    return Request(name, tokens, engine.root(b"t"), wanted, num_prompt_tokens=3, guide=guide)


def text(engine: Engine, tokens: list[int]) -> str:
    from tokenizers import Tokenizer

    assert engine.guides is not None
    return str(Tokenizer.from_file(str(engine.guides.model / "tokenizer.json")).decode(tokens))


@pytest.mark.parametrize("params", [{}, {"temperature": 1.5, "seed": 4}, {"temperature": 0.7, "presence_penalty": 1.0}])
def test_the_answer_is_a_document_of_the_schema_and_then_ends(engine: Engine, params: dict[str, float]) -> None:
    one = request(engine, f"a{params}", **params)
    (tokens,) = engine.generate([one])
    words = json.loads(text(engine, tokens))
    assert len(words) == 2
    assert set(words) <= {"sea", "land"}
    assert one.finish_reason is FinishReason.STOP


def test_a_resumed_answer_goes_on_as_the_undisturbed_one(engine: Engine) -> None:
    (whole,) = engine.generate([request(engine, "w", temperature=1.2, seed=9)])
    (resumed,) = engine.generate([request(engine, "r", tuple(whole[:4]), temperature=1.2, seed=9)])
    assert resumed == whole


@pytest.mark.parametrize("schema", ['{"type": 7}', "not json", '"' + "x" * 70_000 + '"'])
def test_a_schema_that_cannot_be_followed_is_refused(engine: Engine, schema: str) -> None:
    assert engine.guides is not None
    with pytest.raises(InvalidInputError) as caught:
        engine.guides.make(schema)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("response_format", "wanted"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}, {"type": "null"}),
    ],
)
def test_the_gateway_reads_every_kind_of_response_format(response_format: object, wanted: object) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": response_format}
    sampling = parse_chat(json.dumps(body).encode()).sampling(5, None)
    assert json.loads(sampling.get("json_schema", "null")) == wanted


def test_a_response_format_without_its_schema_is_refused() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}
    with pytest.raises(InvalidInputError, match="without a schema"):
        parse_chat(json.dumps(body).encode())
