"""The mixture of experts against transformers in float64, however the work is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cloud.serving.engine import EngineConfig, build_engine  # noqa: E402
from cloud.serving.request import Request, SamplingParams  # noqa: E402
from cloud.serving.scheduler import SchedulerConfig  # noqa: E402
from tests.fakes.serving_models import save_tiny_model  # noqa: E402

PROMPTS = [[5, 9, 11, 20, 7] * 5, [3, 4, 5], list(range(10, 50))]
NEW_TOKENS = 12


@pytest.mark.parametrize(("chunk", "blocks"), [(7, 64), (64, 64), (64, 13)])
def test_greedy_output_is_that_of_the_float64_reference(chunk: int, blocks: int, tmp_path: Path) -> None:
    import transformers

    folder = save_tiny_model(tmp_path, "qwen3_moe")
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    limits = SchedulerConfig(max_batch_tokens=chunk + 8, max_chunk_tokens=chunk, max_running=4)
    engine = build_engine(EngineConfig(folder, "float32", blocks, 8, limits))
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    got = engine.generate([Request(f"r{i}", list(p), engine.root(b"t"), params) for i, p in enumerate(PROMPTS)])
    for prompt, ours in zip(PROMPTS, got, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == ours
    assert (engine.scheduler.num_preemptions > 0) == (blocks == 13)
