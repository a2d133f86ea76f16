"""Embeddings equal transformers' last hidden states pooled by hand: a real model, every combination.

{alone, batched with answers} x {whole, chunks} x {prefix cached before, not} x {mean, last}, on a GPU through its
runner and one step ahead. Elements of vectors of length 1 may differ by TOLERANCE: float32 rounds at 6e-8, and the
thirty layers of the model and another order of the same sums make a few hundred roundings of it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU

from cloud.serving.block_pool import BlockPool, chain_root  # isort: skip  (the interpreter switch comes first)
from cloud.serving.cuda_engine import OverlappedEngine
from cloud.serving.cuda_runner import CudaConfig, CudaRunner
from cloud.serving.engine import Engine
from cloud.serving.kv_pool import KvLayout, KvPool
from cloud.serving.request import Pooling, Request, SamplingParams
from cloud.serving.runner import EagerRunner
from cloud.serving.scheduler import Scheduler, SchedulerConfig
from cloud.serving.torch_backend import TorchBackend
from cloud.serving.weights import load_config, load_decoder

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "models" / "smollm2-135m-instruct"
pytestmark = [pytest.mark.models, pytest.mark.slow]
BLOCK_SIZE = 8
NUM_BLOCKS = 96
COMMON = [(i * 37) % 5000 + 100 for i in range(48)]
INPUTS = [[*COMMON, 400, 401, 402], [(i * 91) % 4000 + 50 for i in range(9)], [*COMMON[:32], *range(700, 730)], [17]]
ANSWERED = [[*COMMON[:40], 55], [8, 9, 10]]
NEW_TOKENS = 12
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def runner() -> Any:
    if not (FOLDER / "config.json").is_file():
        pytest.skip("the model is not in the cache; scripts/prepare_models.py makes it")
    config = load_config(FOLDER)
    decoder = load_decoder(FOLDER, config, TorchBackend(), torch.float32, 256, str(DEVICE))
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, "float32")
    kv = KvPool(layout, NUM_BLOCKS, str(DEVICE))
    if not ON_GPU:
        return EagerRunner(decoder, kv)
    on_gpu = CudaRunner(decoder, kv, CudaConfig(8, 256, (1, 2, 4)))
    on_gpu.capture()
    return on_gpu


@pytest.fixture(scope="module")
def states() -> list[Any]:
    """Last hidden states [tokens, hidden] of the inputs in float64."""
    import transformers

    model: Any = transformers.AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([tokens])).last_hidden_state[0].double() for tokens in INPUTS]


def answers(tag: str) -> list[Request]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    root = chain_root("model", b"tenant")
    return [Request(f"{tag}{i}", list(prompt), root, params) for i, prompt in enumerate(ANSWERED)]


def engine_for(runner: Any, chunk: int) -> Any:
    limits = SchedulerConfig(max_batch_tokens=3 * chunk + 9, max_chunk_tokens=chunk, max_running=8)
    kind: Any = OverlappedEngine if ON_GPU else Engine
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, BLOCK_SIZE), limits)
    return kind(runner, scheduler, runner.kv, "model", 49152)


def settle(engine: Any, requests: list[Request]) -> None:
    while engine.has_work or any(request.finish_reason is None for request in requests):
        engine.step()


@pytest.fixture(scope="module")
def alone(runner: Any) -> list[list[int]]:
    """The answers of an engine that has nothing else to do."""
    engine = engine_for(runner, 128)
    return engine.generate(answers("alone"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_float32_vectors_are_those_of_transformers(
    runner: Any, states: list[Any], alone: list[list[int]], batched: bool, chunked: bool, cached: bool, pooling: Pooling
) -> None:
    engine = engine_for(runner, 7 if chunked else 128)
    root, numbers = chain_root("model", b"tenant"), itertools.count()

    def request(tokens: list[int], kind: Pooling | None) -> Request:
        return Request(f"r{next(numbers)}", list(tokens), root, SamplingParams(max_tokens=1), pooling=kind)

    if cached:
        for tokens in INPUTS:
            engine.generate([request(tokens, None)])
    beside = answers("beside") if batched else []
    for answer in beside:
        engine.scheduler.add(answer)
    if batched:
        engine.step()
        engine.step()
    requests = [request(tokens, pooling) for tokens in INPUTS]
    vectors = engine.embed(requests) if batched else [engine.embed([one])[0] for one in requests]
    settle(engine, beside)
    for vector, rows in zip(vectors, states, strict=True):
        pooled = rows.mean(dim=0) if pooling is Pooling.MEAN else rows[-1]
        assert vector.dtype == np.float32
        assert np.abs(vector - (pooled / pooled.norm()).numpy()).max() < TOLERANCE
    assert [answer.token_ids[answer.num_prompt_tokens :] for answer in beside] == (alone if batched else [])
    found = [one.num_cached_tokens for one in requests]
    if pooling is Pooling.MEAN:
        assert found == [0] * len(INPUTS)
    elif cached:
        assert found == [(len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE for tokens in INPUTS]
    engine.scheduler.check_integrity()
    assert engine.pool.num_free == NUM_BLOCKS
