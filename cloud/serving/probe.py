"""Steps to time an engine with before it serves: one prompt, one row of decoding, on blocks that nobody owns yet."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cloud.serving.cpu_threads import Step
from cloud.serving.engine import Engine
from cloud.serving.request import Request, SamplingParams
from cloud.serving.scheduler import Chunk

PROMPT_TOKENS = 32


def probe_steps(engine: Engine) -> tuple[Step, Step]:
    """(prefill, decode), each to be called with a number of threads. Only before the engine's first request."""
    size = engine.kv.layout.block_size
    length = min(PROMPT_TOKENS, engine.scheduler.max_tokens)
    tokens = [index % engine.vocab_size for index in range(length)]
    request = Request("probe", tokens, b"", SamplingParams(max_tokens=1))
    request.block_ids = list(range(-(-length // size)))
    return _step(engine, Chunk(request, 0, length)), _step(engine, Chunk(request, length - 1, 1))


def _step(engine: Engine, chunk: Chunk) -> Callable[[int], None]:
    def run(num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        engine.runner.run([chunk])

    return run
