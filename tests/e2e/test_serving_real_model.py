"""SmolLM2-135M in float32: the engine's greedy output is transformers' output, however the work is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cloud.serving.engine import Engine, EngineConfig, build_engine  # noqa: E402
from cloud.serving.request import Request, SamplingParams  # noqa: E402
from cloud.serving.scheduler import SchedulerConfig  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / ".cache" / "models" / "smollm2-135m-instruct"
NEW_TOKENS = 24
TEXTS = [
    "The tide comes in twice a day because",
    "def fibonacci(n):\n",
    "List three animals that live on the shore:\n1.",
    "The tide comes in twice a day because the moon pulls on the sea. " * 6 + "At night",
]

pytestmark = [
    pytest.mark.models,
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="weights are not in the cache"),
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def build(chunk: int, blocks: int) -> Engine:
    limits = SchedulerConfig(max_batch_tokens=chunk + 8, max_chunk_tokens=chunk, max_running=7)
    return build_engine(EngineConfig(MODEL, dtype="float32", num_blocks=blocks, scheduler=limits))


def requests(engine: Engine, prompts: list[list[int]], tag: str) -> list[Request]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    return [Request(f"{tag}{i}", list(p), engine.root(b"t"), params) for i, p in enumerate(prompts)]


@pytest.mark.parametrize(("chunk", "blocks"), [(512, 256), (19, 256), (64, 11)])
def test_greedy_output_equals_transformers_batched_alone_cached_and_preempted(
    chunk: int, blocks: int, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine = build(chunk, blocks)
    assert engine.generate(requests(engine, prompts, "batched")) == expected
    assert (engine.scheduler.num_preemptions > 0) == (blocks == 11)
    alone = requests(engine, prompts, "alone")
    for request, answer in zip(alone, expected, strict=True):
        assert engine.generate([request]) == [answer]
    if blocks == 256:
        assert alone[3].num_cached_tokens == (len(prompts[3]) - 1) // 16 * 16
    engine.scheduler.check_integrity()
