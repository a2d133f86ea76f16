"""The engine on tiny random models: its greedy output is transformers' greedy output, however the work is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cloud.serving.engine import Engine, EngineConfig, build_engine  # noqa: E402
from cloud.serving.request import Request, SamplingParams  # noqa: E402
from cloud.serving.scheduler import SchedulerConfig  # noqa: E402
from tests.fakes.serving_models import FAMILIES, save_tiny_model  # noqa: E402
from wire.errors import UnsupportedModelError  # noqa: E402

PROMPTS = [[5, 9, 11, 20, 7] * 9, [3, 4, 5], list(range(10, 99)), [5, 9, 11, 20, 7] * 9 + [8, 8]]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[list[int]]]:
    import transformers

    answers: dict[str, list[list[int]]] = {}
    for family, folder in folders.items():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.eval()
        answers[family] = []
        for prompt in PROMPTS:
            tokens = torch.tensor([prompt])
            for _ in range(NEW_TOKENS):
                with torch.no_grad():
                    tokens = torch.cat((tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
            answers[family].append(tokens[0, len(prompt) :].tolist())
    return answers


def engine_for(folder: Path, *, blocks: int = 64, chunk: int = 256, running: int = 8, dtype: str = "auto") -> Engine:
    limits = SchedulerConfig(max_batch_tokens=chunk + running, max_chunk_tokens=chunk, max_running=running)
    return build_engine(EngineConfig(folder, dtype=dtype, num_blocks=blocks, block_size=8, scheduler=limits))


def requests_for(engine: Engine, prompts: list[list[int]], tag: str = "r") -> list[Request]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    return [Request(f"{tag}{i}", list(p), engine.root(b"tenant"), params) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [7, 256])
def test_batched_output_equals_transformers(
    family: str, chunk: int, folders: dict[str, Path], expected: dict[str, list[list[int]]]
) -> None:
    engine = engine_for(folders[family], chunk=chunk)
    assert engine.generate(requests_for(engine, PROMPTS)) == expected[family]
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_hit_changes_nothing_but_the_work(
    family: str, folders: dict[str, Path], expected: dict[str, list[list[int]]]
) -> None:
    engine = engine_for(folders[family])
    for attempt in range(2):
        for index, prompt in enumerate(PROMPTS):
            (request,) = requests_for(engine, [prompt], f"{attempt}-{index}-")
            assert engine.generate([request]) == [expected[family][index]]
            if attempt:
                assert request.num_cached_tokens == (len(prompt) - 1) // 8 * 8


@pytest.mark.parametrize("family", FAMILIES)
def test_preempted_requests_give_the_same_output(
    family: str, folders: dict[str, Path], expected: dict[str, list[list[int]]]
) -> None:
    engine = engine_for(folders[family], blocks=20, chunk=16)
    assert engine.generate(requests_for(engine, PROMPTS)) == expected[family]
    assert engine.scheduler.num_preemptions > 0


def test_another_tenant_never_hits_the_cache(folders: dict[str, Path]) -> None:
    engine = engine_for(folders["llama"])
    engine.generate(requests_for(engine, PROMPTS[:1]))
    stranger = Request("s", list(PROMPTS[0]), engine.root(b"another"), SamplingParams(max_tokens=1))
    engine.generate([stranger])
    assert stranger.num_cached_tokens == 0


def test_a_seeded_draw_is_the_same_alone_batched_and_resumed(folders: dict[str, Path]) -> None:
    engine = engine_for(folders["qwen3"])
    params = SamplingParams(max_tokens=20, temperature=0.9, top_k=40, top_p=0.9, seed=7, ignore_eos=True)
    penal = SamplingParams(max_tokens=20, temperature=0.9, seed=7, presence_penalty=0.7, ignore_eos=True)
    root = engine.root(b"t")
    for name, wanted in (("plain", params), ("penalties", penal)):
        (alone,) = engine.generate([Request(f"{name}-a", list(PROMPTS[1]), root, wanted)])
        batched = engine.generate(
            [Request(f"{name}-b{i}", list(p), root, wanted) for i, p in enumerate([PROMPTS[2], PROMPTS[1]])]
        )
        resumed = Request(f"{name}-c", PROMPTS[1] + alone[:9], root, wanted, num_prompt_tokens=len(PROMPTS[1]))
        assert batched[1] == alone
        assert engine.generate([resumed]) == [alone]


def test_bfloat16_runs_and_stays_close_to_float32(folders: dict[str, Path]) -> None:
    params = SamplingParams(max_tokens=1, num_logprobs=5)
    tops = []
    for dtype in ("float32", "bfloat16"):
        engine = engine_for(folders["llama"], dtype=dtype)
        request = Request("a", list(PROMPTS[0]), engine.root(b"t"), params)
        engine.scheduler.add(request)
        events = engine.step()
        assert events[0].token is not None
        tops.append(dict(events[0].token.top_logprobs))
    common = tops[0].keys() & tops[1].keys()
    assert len(common) >= 3
    assert all(abs(tops[0][t] - tops[1][t]) < 0.2 for t in common)


def test_a_stop_token_ends_the_answer(folders: dict[str, Path], expected: dict[str, list[list[int]]]) -> None:
    engine = engine_for(folders["llama"])
    stop = expected["llama"][1][5]
    first = expected["llama"][1].index(stop)
    params = SamplingParams(max_tokens=50, stop_token_ids=frozenset({stop}))
    request = Request("a", list(PROMPTS[1]), engine.root(b"t"), params)
    assert engine.generate([request])[0] == expected["llama"][1][: first + 1]
    assert request.finish_reason == "stop"


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json is missing"):
        build_engine(EngineConfig(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        build_engine(EngineConfig(tmp_path))
