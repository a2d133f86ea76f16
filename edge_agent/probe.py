"""Golden inputs on the device: does the new model compute what the publisher saw, without NaN, fast enough?"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from edge_agent.conduct import is_slower
from edge_agent.runtimes.base import Array, LanguageRuntime, NotFiniteError, TensorRuntime
from model_registry.manifest import Golden, Manifest
from wire.errors import ForeshoreError, InvalidInputError

MAX_LANGUAGE_CASES = 8
MIN_RUNS = 9  # of each version, to compare their speed
MAX_TIMING_S = 2.0


class ProbeFailedError(ForeshoreError):
    """The model loads but does not compute what it should."""

    code = "probe_failed"


class WrongShapeError(ProbeFailedError):
    """Inputs or outputs are not those that the publisher saw."""

    code = "wrong_shape"


class InaccurateError(ProbeFailedError):
    """The outputs are too far from those that the publisher saw."""

    code = "inaccurate"


class TooSlowError(ProbeFailedError):
    """The version that runs now answers the same inputs much faster."""

    code = "too_slow"


Runtime = TensorRuntime | LanguageRuntime


def probe(manifest: Manifest, files: Path, runtime: Runtime, *, old: Runtime | None, max_slowdown: float) -> float:
    """Median latency in ms over the golden cases (per token for language). Blocking.

    Raises a `ProbeFailedError` or `NotFiniteError`. The old version is timed on the same cases in the same minute.
    """
    golden = manifest.golden
    if golden is None:
        return 0.0
    path = files / golden.path
    if manifest.kind == "tensor":
        cases = _tensor_cases(path)
        latency_ms = _probe_tensor(golden, cases, cast(TensorRuntime, runtime))
        clock: Callable[[Runtime], list[float]] = partial(_time_tensor, cases)
    else:
        prompts = _language_cases(path)
        latency_ms = _probe_language(golden, prompts, cast(LanguageRuntime, runtime))
        clock = partial(_time_language, prompts)
    if old is not None:
        _check_speed(clock, runtime, old, max_slowdown)
    return latency_ms


def run_once(manifest: Manifest, files: Path, runtime: Runtime) -> None:
    """One golden case, whatever comes out; nothing when there is none."""
    if manifest.golden is None:
        return
    path = files / manifest.golden.path
    if manifest.kind == "tensor":
        cast(TensorRuntime, runtime).infer(_tensor_cases(path)[0].inputs)
    else:
        case = _language_cases(path)[0]
        cast(LanguageRuntime, runtime).agreement(case["prompt_tokens"], case["tokens"][:1])


@dataclass(frozen=True)
class _Case:
    inputs: dict[str, Array]
    outputs: dict[str, Array]


def _tensor_cases(path: Path) -> list[_Case]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    inputs = {name.removeprefix("input."): value for name, value in arrays.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): value for name, value in arrays.items() if name.startswith("output.")}
    num_cases = min((len(value) for value in arrays.values()), default=0)
    if not num_cases or not outputs:
        raise ProbeFailedError("the golden file holds no case", remedy="publish the model again")
    return [
        _Case({n: v[case : case + 1] for n, v in inputs.items()}, {n: v[case : case + 1] for n, v in outputs.items()})
        for case in range(num_cases)
    ]


def _language_cases(path: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"][:MAX_LANGUAGE_CASES]
    if not cases:
        raise ProbeFailedError("the golden file holds no case", remedy="publish the model again")
    return cases


def _check_speed(clock: Callable[[Runtime], list[float]], new: Runtime, old: Runtime, max_slowdown: float) -> None:
    """Time both in turn and compare the best of each: other work on the device only ever adds time."""
    old_ms: list[float] = []
    new_ms: list[float] = []
    until = time.monotonic() + MAX_TIMING_S
    while len(new_ms) < MIN_RUNS and (not new_ms or time.monotonic() < until):
        try:
            old_ms += clock(old)
        except InvalidInputError:  # it takes other inputs: there is nothing to compare
            return
        new_ms += clock(new)
    if is_slower(min(new_ms), min(old_ms), max_slowdown):
        raise TooSlowError(
            f"a golden case takes {min(new_ms):.1f} ms, with the running version {min(old_ms):.1f} ms",
            remedy=f"at most {max_slowdown:g} times slower is accepted",
        )


def _time_tensor(cases: list[_Case], runtime: Runtime) -> list[float]:
    times_ms = []
    for case in cases[:MIN_RUNS]:
        begun = time.perf_counter()
        cast(TensorRuntime, runtime).infer(case.inputs)
        times_ms.append((time.perf_counter() - begun) * 1000)
    return times_ms


def _time_language(cases: list[dict[str, Any]], runtime: Runtime) -> list[float]:
    begun = time.perf_counter()
    cast(LanguageRuntime, runtime).agreement(cases[0]["prompt_tokens"], cases[0]["tokens"])
    return [(time.perf_counter() - begun) * 1000 / max(len(cases[0]["tokens"]), 1)]


def _probe_tensor(golden: Golden, cases: list[_Case], runtime: TensorRuntime) -> float:
    latencies_ms, num_same = [], 0
    for number, case in enumerate(cases):
        begun = time.perf_counter()
        try:
            got = runtime.infer(case.inputs, list(case.outputs))
        except InvalidInputError as error:
            raise WrongShapeError(f"golden case {number}: {error.message}", remedy="mend the model") from error
        except Exception as error:
            raise ProbeFailedError(f"golden case {number} fails: {error}", remedy="mend the model") from error
        latencies_ms.append((time.perf_counter() - begun) * 1000)
        for name, expected in case.outputs.items():
            _check_case(golden, name, number, got[name], expected)
        first = next(iter(case.outputs))
        num_same += int(np.argmax(got[first]) == np.argmax(case.outputs[first]))
    share = num_same / len(cases)
    if golden.min_top1_agreement is not None and share < golden.min_top1_agreement:
        raise InaccurateError(
            f"top-1 agrees in {num_same} of {len(cases)} golden cases",
            remedy=f"{golden.min_top1_agreement:g} is required",
        )
    return statistics.median(latencies_ms[1:] or latencies_ms)


def _check_case(golden: Golden, name: str, number: int, got: Array, expected: Array) -> None:
    where = f"output {name!r} of golden case {number}"
    if got.shape != expected.shape:
        raise WrongShapeError(f"{where} has shape {got.shape}, not {expected.shape}", remedy="mend the model")
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(got).all():
        raise NotFiniteError(f"{where} is not finite", remedy="mend the model")
    worst = float(np.max(np.abs(got - expected), initial=0.0))
    if golden.max_abs_error is not None and worst > golden.max_abs_error:
        raise InaccurateError(f"{where} is off by {worst:.4g}", remedy=f"at most {golden.max_abs_error:g}")
    scale = float(np.linalg.norm(got) * np.linalg.norm(expected))
    cosine = float(np.vdot(got, expected)) / scale if scale else float(not np.any(got - expected))
    if golden.min_cosine is not None and cosine < golden.min_cosine:
        raise InaccurateError(f"{where} has cosine {cosine:.4f}", remedy=f"at least {golden.min_cosine:g}")


def _probe_language(golden: Golden, cases: list[dict[str, Any]], runtime: LanguageRuntime) -> float:
    shares, latencies_ms = [], []
    for case in cases:
        begun = time.perf_counter()
        shares.append(runtime.agreement(case["prompt_tokens"], case["tokens"]))
        latencies_ms.append((time.perf_counter() - begun) * 1000 / max(len(case["tokens"]), 1))
    share = statistics.fmean(shares)
    if golden.min_token_agreement is not None and share < golden.min_token_agreement:
        raise InaccurateError(
            f"{share:.2f} of the golden tokens agree", remedy=f"{golden.min_token_agreement:g} is required"
        )
    return statistics.median(latencies_ms)
