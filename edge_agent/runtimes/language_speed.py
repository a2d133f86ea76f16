"""How fast a runtime decodes a language model: what the compiler asks when it chooses among the agent's runtimes.

One thread, greedy, seeded prompts of `PROMPT_TOKENS` tokens. One stream, then several at once; the best of
`NUM_ROUNDS`, so that a neighbour's load does not choose. The first round of each only warms up.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import cast

import numpy as np

from edge_agent.runtimes.base import LanguageLimits, LanguageRuntime, Sampling, generate
from edge_agent.runtimes.language import load_language
from model_registry.manifest import ChosenRuntime

PROMPT_TOKENS, NEW_TOKENS = 32, 24
NUM_STREAMS, NUM_ROUNDS = 4, 3
JOIN_TIMEOUT_S = 300.0


def measure(folder: str, runtime: str) -> dict[str, float]:
    """Tokens per second of one stream and of all together, prompts included, and the peak of resident memory.

    Raises `UnsupportedModelError` where `runtime` does not run the model.
    """
    limits = LanguageLimits(context_tokens=PROMPT_TOKENS + NEW_TOKENS, num_streams=NUM_STREAMS, num_threads=1)
    model = load_language(Path(folder), limits, cast(ChosenRuntime, runtime))
    try:
        figures = {
            f"decode_{count}_tokens_per_s": max([_rate(model, count) for _ in range(NUM_ROUNDS + 1)][1:])
            for count in (1, NUM_STREAMS)
        }
    finally:
        model.close()
    return figures | {"peak_mb": _peak_mb()}


def _peak_mb() -> float:
    """Of this program alone; `getrusage` also counts what the parent held when it started this process."""
    status = Path("/proc/self/status").read_text()
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return round(int(peak_kib) / 1024, 1)


def _rate(model: LanguageRuntime, num_streams: int) -> float:
    """Tokens that all streams gave, by the seconds until the last one ended."""
    prompts = np.random.default_rng(0).integers(10, 50, (num_streams, PROMPT_TOKENS)).tolist()
    counts: list[int] = []
    errors: list[Exception] = []

    def ask(prompt: list[int]) -> None:
        try:
            counts.append(sum(1 for _ in generate(model, prompt, Sampling(NEW_TOKENS))))
        except Exception as error:  # noqa: BLE001 - top of the thread: raised below
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_TIMEOUT_S)
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    return round(sum(counts) / seconds, 2)
