"""A real agent process with a language model, against the same runtime called in this process, and bare GenAI: the same
completion, streamed, in turn; the best of the rounds counts.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "The history of the city begins with"
WAIT_S = 180
CONTEXT_TOKENS = 512


def overhead(folder: Path, num_threads: int, num_rounds: int, max_tokens: int) -> dict[str, float]:
    """Figures by name; times are per token of the whole answer."""
    import httpx

    from edge_agent.runtimes.base import LanguageLimits, Sampling, generate
    from edge_agent.runtimes.language import load_language
    from edge_agent.trial import resident_bytes
    from tests.fakes.agent_plane import AgentProcess, Plane

    runtime = load_language(folder, LanguageLimits(CONTEXT_TOKENS, 1, num_threads))
    prompt = runtime.encode(PROMPT)
    sampling = Sampling(max_tokens)
    with tempfile.TemporaryDirectory(prefix="foreshore-edge-", ignore_cleanup_errors=True) as place:
        plane, agent = Plane(Path(place) / "plane"), AgentProcess(Path(place) / "home")
        try:
            _serve(plane, agent, Path(place), folder, num_threads)
            with httpx.Client(base_url=agent.url, timeout=WAIT_S) as client:
                ways: dict[str, Callable[[], int]] = {
                    "runtime": lambda: sum(1 for _ in generate(runtime, prompt, sampling)),
                    "agent": lambda: _streamed(client, max_tokens),
                    "genai": _bare(folder, num_threads, prompt, max_tokens),
                }
                rounds = [{name: _timed(way) for name, way in ways.items()} for _ in range(num_rounds + 1)][1:]
                best = {name: min(times[name] for times in rounds) for name in ways}
            resident_mb = resident_bytes(agent.pid) / (1 << 20)
        finally:
            agent.stop()
            plane.close()
            runtime.close()
    return {
        "agent_overhead_ratio": best["agent"] / best["runtime"],
        "agent_ratio_vs_genai": best["agent"] / best["genai"],
        "agent_ms_per_token": best["agent"] * 1000,
        "runtime_ms_per_token": best["runtime"] * 1000,
        "genai_ms_per_token": best["genai"] * 1000,
        "agent_resident_mb": resident_mb,
    }


def _serve(plane: Any, agent: Any, place: Path, folder: Path, num_threads: int) -> None:
    plane.is_silent = True  # the content comes over HTTP
    profile = place / "profile.yaml"
    profile.write_text(
        f"name: bench\ntargets: [cpu-x86]\nmemory_budget_bytes: 2000000000\nmax_context_tokens: {CONTEXT_TOKENS}\n"
        f"fetch_stall_s: 0.3\nnum_threads: {num_threads}\n"
    )
    agent.enrol(plane.url, str(profile))
    agent.start()
    golden = {"cases": [{"prompt_tokens": [504, 3575, 282, 4649, 314], "tokens": [7042]}]}
    plane.wish(plane.publish_language(folder, "1.0.0", json.dumps(golden).encode()))
    done = plane.await_model(lambda model: model.get("result") is not None, WAIT_S, "chat")
    if done["result"] != "succeeded":
        raise RuntimeError(f"the agent did not take the model: {done}")


def _streamed(client: Any, max_tokens: int) -> int:
    body = {"model": "chat", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        return sum(line.startswith("data: {") for line in reply.iter_lines())


def _bare(folder: Path, num_threads: int, prompt: list[int], max_tokens: int) -> Callable[[], int]:
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": num_threads}}}}))
    model = genai.Model(config)

    def run() -> int:
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + max_tokens)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.asarray(prompt, np.int32))
        num_tokens = 0
        while not generator.is_done():
            generator.generate_next_token()
            num_tokens += 1
        return num_tokens

    return run


def _timed(way: Callable[[], int]) -> float:
    begin = time.perf_counter()
    num_tokens = way()
    return (time.perf_counter() - begin) / num_tokens
