"""Golden inputs on the device: does the new model compute what the publisher saw, without NaN, fast enough?"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from edge_agent.runtimes.base import Array, LanguageRuntime, TensorRuntime
from model_registry.manifest import Golden, Manifest
from wire.errors import ForeshoreError

MAX_LANGUAGE_CASES = 8


class ProbeFailedError(ForeshoreError):
    """The model loads but does not compute what it should."""

    code = "probe_failed"


def probe(
    manifest: Manifest,
    files: Path,
    runtime: TensorRuntime | LanguageRuntime,
    *,
    old_latency_ms: float | None,
    max_slowdown: float,
) -> float:
    """Median latency in ms over the golden cases; raises `ProbeFailedError`. Blocking."""
    golden = manifest.golden
    if golden is None:
        return 0.0
    if manifest.kind == "tensor":
        latency_ms = _probe_tensor(golden, files / golden.path, cast(TensorRuntime, runtime))
    else:
        latency_ms = _probe_language(golden, files / golden.path, cast(LanguageRuntime, runtime))
    if old_latency_ms and latency_ms > max(old_latency_ms * max_slowdown, old_latency_ms + 5):
        raise ProbeFailedError(
            f"median latency is {latency_ms:.1f} ms, the running version's was {old_latency_ms:.1f} ms",
            remedy=f"at most {max_slowdown:g} times slower is accepted",
        )
    return latency_ms


def _probe_tensor(golden: Golden, path: Path, runtime: TensorRuntime) -> float:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    inputs = {name.removeprefix("input."): value for name, value in arrays.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): value for name, value in arrays.items() if name.startswith("output.")}
    num_cases = min(len(value) for value in [*inputs.values(), *outputs.values()])
    latencies_ms, num_same = [], 0
    for case in range(num_cases):
        begun = time.perf_counter()
        got = runtime.infer({name: value[case : case + 1] for name, value in inputs.items()}, list(outputs))
        latencies_ms.append((time.perf_counter() - begun) * 1000)
        for name, expected in outputs.items():
            _check_case(golden, name, case, got[name].astype(np.float64), expected[case : case + 1].astype(np.float64))
        first = next(iter(outputs))
        num_same += int(np.argmax(got[first]) == np.argmax(outputs[first][case]))
    share = num_same / max(num_cases, 1)
    if golden.min_top1_agreement is not None and share < golden.min_top1_agreement:
        raise ProbeFailedError(
            f"top-1 agrees in {num_same} of {num_cases} golden cases",
            remedy=f"{golden.min_top1_agreement:g} is required",
        )
    return statistics.median(latencies_ms[1:] or latencies_ms)


def _check_case(golden: Golden, name: str, case: int, got: Array, expected: Array) -> None:
    where = f"output {name!r} of golden case {case}"
    if got.shape != expected.shape:
        raise ProbeFailedError(f"{where} has shape {got.shape}, not {expected.shape}", remedy="mend the model")
    if not np.isfinite(got).all():
        raise ProbeFailedError(f"{where} is not finite", remedy="mend the model")
    worst = float(np.max(np.abs(got - expected), initial=0.0))
    if golden.max_abs_error is not None and worst > golden.max_abs_error:
        raise ProbeFailedError(f"{where} is off by {worst:.4g}", remedy=f"at most {golden.max_abs_error:g}")
    scale = float(np.linalg.norm(got) * np.linalg.norm(expected))
    cosine = float(np.vdot(got, expected)) / scale if scale else float(not np.any(got - expected))
    if golden.min_cosine is not None and cosine < golden.min_cosine:
        raise ProbeFailedError(f"{where} has cosine {cosine:.4f}", remedy=f"at least {golden.min_cosine:g}")


def _probe_language(golden: Golden, path: Path, runtime: LanguageRuntime) -> float:
    cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"][:MAX_LANGUAGE_CASES]
    shares, latencies_ms = [], []
    for case in cases:
        begun = time.perf_counter()
        shares.append(runtime.agreement(case["prompt_tokens"], case["tokens"]))
        latencies_ms.append((time.perf_counter() - begun) * 1000 / max(len(case["tokens"]), 1))
    share = statistics.fmean(shares) if shares else 1.0
    if golden.min_token_agreement is not None and share < golden.min_token_agreement:
        raise ProbeFailedError(
            f"{share:.2f} of the golden tokens agree", remedy=f"{golden.min_token_agreement:g} is required"
        )
    return statistics.median(latencies_ms) if latencies_ms else 0.0
