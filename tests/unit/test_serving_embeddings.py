"""Embeddings on tiny random models: pooled hidden states of transformers, however the work is cut up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cloud.serving.engine import Engine, EngineConfig, build_engine  # noqa: E402
from cloud.serving.pooler import read_pooling  # noqa: E402
from cloud.serving.request import FinishReason, Pooling, Request, SamplingParams  # noqa: E402
from cloud.serving.scheduler import SchedulerConfig  # noqa: E402
from tests.fakes.serving_models import FAMILIES, save_tiny_model  # noqa: E402
from wire.errors import InvalidInputError, OverloadedError, UnsupportedModelError  # noqa: E402

PROMPTS = [[5, 9, 11, 20, 7] * 9, [3], list(range(10, 99)), [5, 9, 11, 20, 7] * 9 + [8, 8], [4] * 16]
TOLERANCE = 2e-6  # of elements of vectors of length 1: some ten roundings of float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str, Pooling], list[Any]]:
    import transformers

    vectors: dict[tuple[str, Pooling], list[Any]] = {}
    for family, folder in folders.items():
        model: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            states = [model(torch.tensor([prompt])).last_hidden_state[0].double() for prompt in PROMPTS]
        for pooling in Pooling:
            pooled = [s.mean(dim=0) if pooling is Pooling.MEAN else s[-1] for s in states]
            vectors[family, pooling] = [(one / one.norm()).numpy() for one in pooled]
    return vectors


def engine_for(folder: Path, *, blocks: int = 64, chunk: int = 256, running: int = 8, waiting: int = 16) -> Engine:
    limits = SchedulerConfig(
        max_batch_tokens=chunk + running, max_chunk_tokens=chunk, max_running=running, max_waiting=waiting
    )
    return build_engine(EngineConfig(folder, num_blocks=blocks, block_size=8, scheduler=limits))


def inputs_for(engine: Engine, pooling: Pooling, tag: str = "e", prompts: list[list[int]] = PROMPTS) -> list[Request]:
    root = engine.root(b"tenant")
    return [Request(f"{tag}{i}", list(p), root, pooling=pooling) for i, p in enumerate(prompts)]


def answer_for(engine: Engine, prompt: list[int], request_id: str = "g", num_tokens: int = 30) -> Request:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    return Request(request_id, list(prompt), engine.root(b"tenant"), params)


def assert_close(got: list[Any], wanted: list[Any]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == np.float32
        assert np.abs(mine - theirs).max() < TOLERANCE


def assert_nothing_is_left(engine: Engine) -> None:
    engine.scheduler.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("chunk", [7, 256])
def test_vectors_are_those_of_transformers_alone_and_in_a_batch(
    family: str, pooling: Pooling, chunk: int, folders: dict[str, Path], expected: Any
) -> None:
    engine = engine_for(folders[family], chunk=chunk)
    assert_close(engine.embed(inputs_for(engine, pooling)), expected[family, pooling])
    assert_nothing_is_left(engine)
    engine.pool.clear_names()
    alone = [engine.embed([request])[0] for request in inputs_for(engine, pooling, "alone")]
    assert_close(alone, expected[family, pooling])
    assert engine.num_output_tokens == 0


@pytest.mark.parametrize("pooling", list(Pooling))
def test_a_cached_prefix_is_used_only_where_the_vector_needs_no_state_of_it(
    pooling: Pooling, folders: dict[str, Path], expected: Any
) -> None:
    engine = engine_for(folders["llama"], chunk=16)
    engine.generate([answer_for(engine, prompt, f"g{i}", 1) for i, prompt in enumerate(PROMPTS)])
    requests = inputs_for(engine, pooling)
    assert_close(engine.embed(requests), expected["llama", pooling])
    cached = [0 if pooling is Pooling.MEAN else (len(prompt) - 1) // 8 * 8 for prompt in PROMPTS]
    assert [request.num_cached_tokens for request in requests] == cached
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("pooling", list(Pooling))
def test_an_embedding_leaves_a_prefix_that_an_answer_finds(pooling: Pooling, folders: dict[str, Path]) -> None:
    engine, fresh = engine_for(folders["qwen3"]), engine_for(folders["qwen3"])
    engine.embed(inputs_for(engine, pooling))
    answer = answer_for(engine, PROMPTS[2])
    assert engine.generate([answer]) == fresh.generate([answer_for(fresh, PROMPTS[2])])
    assert answer.num_cached_tokens == 88


@pytest.mark.parametrize("pooling", list(Pooling))
def test_answers_beside_embeddings_are_what_they_are_alone(
    pooling: Pooling, folders: dict[str, Path], expected: Any
) -> None:
    engine, quiet = engine_for(folders["qwen2"], chunk=11), engine_for(folders["qwen2"])
    answer = answer_for(engine, PROMPTS[0])
    engine.scheduler.add(answer)
    for _ in range(3):
        engine.step()
    assert_close(engine.embed(inputs_for(engine, pooling)), expected["qwen2", pooling])
    assert answer.finish_reason is None, "the answer was in progress all the time"
    while answer.finish_reason is None:
        engine.step()
    assert answer.token_ids[len(PROMPTS[0]) :] == quiet.generate([answer_for(quiet, PROMPTS[0])])[0]
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("pooling", list(Pooling))
def test_a_preempted_input_is_pooled_from_its_beginning(
    pooling: Pooling, folders: dict[str, Path], expected: Any
) -> None:
    engine = engine_for(folders["llama"], blocks=18, chunk=2)
    answers = [answer_for(engine, [9 + i] * 3, f"g{i}", 60) for i in range(2)]
    for answer in answers:
        answer.priority = -1
        engine.scheduler.add(answer)
    for _ in range(4):
        engine.step()
    (vector,) = engine.embed(inputs_for(engine, pooling, prompts=[PROMPTS[2]]))
    assert engine.scheduler.num_preemptions > 0
    assert_close([vector], [expected["llama", pooling][2]])
    while any(answer.finish_reason is None for answer in answers):
        engine.step()
    assert_nothing_is_left(engine)


def test_an_input_cancelled_between_two_chunks_leaves_nothing(folders: dict[str, Path], expected: Any) -> None:
    engine = engine_for(folders["llama"], chunk=8)
    (request,) = inputs_for(engine, Pooling.MEAN, prompts=[PROMPTS[2]])
    engine.scheduler.add(request)
    engine.step()
    engine.step()
    engine.scheduler.cancel(request.request_id)
    assert request.finish_reason is FinishReason.CANCELLED
    assert_nothing_is_left(engine)
    assert_close(engine.embed(inputs_for(engine, Pooling.MEAN)), expected["llama", Pooling.MEAN])
    assert engine.runner.pooler.num_open == 0  # type: ignore[attr-defined]


def test_an_input_may_fill_the_context_and_not_more(folders: dict[str, Path]) -> None:
    engine = engine_for(folders["llama"], blocks=4, chunk=16)
    (vector,) = engine.embed(inputs_for(engine, Pooling.LAST, prompts=[[3] * 32]))
    assert abs(float(np.linalg.norm(vector)) - 1) < 1e-6
    with pytest.raises(InvalidInputError, match="33 tokens and the context holds 32") as caught:
        engine.embed(inputs_for(engine, Pooling.LAST, "long", [[3] * 33]))
    assert caught.value.details == {"param": "input", "reason": "context_length_exceeded"}


def test_a_full_queue_refuses_an_embedding_too(folders: dict[str, Path]) -> None:
    engine = engine_for(folders["llama"], waiting=2)
    with pytest.raises(OverloadedError):
        engine.embed(inputs_for(engine, Pooling.MEAN))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_a_model_without_a_head_embeds(
    family: str, folders: dict[str, Path], expected: Any, tmp_path: Path
) -> None:
    import transformers

    transformers.AutoModel.from_pretrained(folders[family], dtype=torch.float32).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [f"{family.capitalize()}Model"]
    engine = engine_for(tmp_path)
    assert_close(engine.embed(inputs_for(engine, engine.pooling)), expected[family, engine.pooling])


def test_attention_in_both_directions_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["qwen2"] / "config.json").read_text())
    write(tmp_path / "config.json", {**config, "is_causal": False})
    with pytest.raises(UnsupportedModelError, match="both directions"):
        engine_for(tmp_path)


FLAGS = {f"pooling_mode_{mode}": False for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "pool", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({**FLAGS, "pooling_mode_mean_tokens": True}, Pooling.MEAN),
        ({**FLAGS, "pooling_mode_lasttoken": True, "include_prompt": True}, Pooling.LAST),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 48}, Pooling.LAST),
        ({"pooling_mode": "mean"}, Pooling.MEAN),
    ],
)
def test_the_model_folder_says_how_to_pool(config: Any, pooling: Pooling, tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is Pooling.MEAN, "a folder that says nothing"
    write(tmp_path / "1_Pooling" / "config.json", config)
    assert read_pooling(tmp_path) is pooling
    write(tmp_path / "modules.json", MODULES)
    assert read_pooling(tmp_path) is Pooling.MEAN, "the module's folder has no file"
    write(tmp_path / "pool" / "config.json", config)
    assert read_pooling(tmp_path) is pooling


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("1_Pooling/config.json", {**FLAGS, "pooling_mode_cls_token": True}, "pools by cls"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "mean and max"),
        ("1_Pooling/config.json", FLAGS, "pools by nothing"),
        ("1_Pooling/config.json", [], "does not hold an object"),
        ("modules.json", {}, "list of modules"),
        ("modules.json", [*MODULES, {"path": "3", "type": "sentence_transformers.models.Dense"}], "modules Dense"),
        ("modules.json", [{"path": "../other", "type": "sentence_transformers.models.Pooling"}], "outside"),
    ],
)
def test_a_folder_that_pools_otherwise_is_refused(name: str, content: Any, reason: str, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    with pytest.raises(UnsupportedModelError, match=reason):
        read_pooling(tmp_path)


def test_the_engine_takes_the_folders_pooling(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    write(folder / "1_Pooling" / "config.json", {**FLAGS, "pooling_mode_lasttoken": True})
    assert engine_for(folder).pooling is Pooling.LAST
