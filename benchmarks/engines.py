"""Engines and compatibility: is the resolver right and quick, and how fast ONNX Runtime answers when an engine fails.

The pairs with known outcome are those of `tests/unit/test_compatibility.py`; the engines are really built by
TensorRT-RTX, which then refuses them on a machine without a GPU: that is the failure that is timed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Goal

GOALS = [
    Goal("resolver_pairs", 200, ">="),
    Goal("resolver_wrong_will_run", 0, "<="),
    Goal("resolver_wrong_refusal_share", 0.02, "<="),
    Goal("resolver_ms", 5.0, "<="),
    Goal("engine_capabilities", 3, ">="),
    Goal("fallback_s", 5.0, "<="),
    Goal("refused_engine_s", 5.0, "<="),
]
VISION = Path(__file__).resolve().parent.parent / ".cache" / "models" / "mobilenet_v2.onnx"
CAPABILITIES = ("8.6", "8.9", "12.0")


def run(quick: bool) -> dict[str, float]:
    """Without MobileNetV2 in `.cache/models` a small classifier takes its place."""
    with tempfile.TemporaryDirectory(prefix="foreshore-engines-") as folder:
        return {**_resolver(5 if quick else 50), **_engines(Path(folder), 3 if quick else 10)}


def _resolver(num_rounds: int) -> dict[str, float]:
    from model_registry.compatibility import resolve
    from tests.unit.test_compatibility import ARTEFACTS, DEVICES, PAIRS

    begun = time.perf_counter()
    for _ in range(num_rounds):
        verdicts = [resolve(ARTEFACTS[artefact], DEVICES[device]).will_run for device, artefact, _ in PAIRS]
    took_s = time.perf_counter() - begun
    known = [letter == "+" for _, _, letter in PAIRS]
    return {
        "resolver_pairs": float(len(PAIRS)),
        "resolver_wrong_will_run": float(sum(said and not runs for said, runs in zip(verdicts, known, strict=True))),
        "resolver_wrong_refusal_share": sum(runs and not said for said, runs in zip(verdicts, known, strict=True))
        / len(PAIRS),
        "resolver_ms": took_s * 1000 / (num_rounds * len(PAIRS)),
    }


def _engines(folder: Path, num_runs: int) -> dict[str, float]:
    from compiler.targets import EngineTarget
    from compiler.tensorrt import Builder, build_engine, find_builder
    from edge_agent.runtimes.onnxruntime_tensor import OnnxRuntimeTensor
    from tests.fakes.compiler_models import write_classifier

    graph = VISION if VISION.exists() else write_classifier(folder / "small.onnx")
    shape = (1, 3, 224, 224) if graph == VISION else (1, 3, 32, 32)
    builder = find_builder("tensorrt-rtx")
    if not isinstance(builder, Builder):
        raise SystemExit(builder.reason)
    times_s = []
    for capability in CAPABILITIES:
        begun = time.perf_counter()
        target = EngineTarget(builder="tensorrt-rtx", compute_capabilities=[capability])
        build_engine(builder, target, graph, folder / f"{capability}.engine")
        times_s.append(time.perf_counter() - begun)
    portable = OnnxRuntimeTensor(graph, [], 1)
    feeds = {portable.inputs[0].name: np.zeros(shape, np.float32)}
    falls_s = [_fall_s(graph, portable, feeds) for _ in range(num_runs)]
    return {
        "engine_capabilities": float(len(times_s)),
        "engine_build_s": statistics.median(times_s),
        "fallback_s": max(falls_s),
        "refused_engine_s": _refused_s(builder.load(), folder / "8.9.engine", portable, feeds),
    }


def _fall_s(graph: Path, portable: Any, feeds: dict[str, Any]) -> float:
    """From a request that breaks the engine to its answer by a freshly loaded portable artefact."""
    from edge_agent.engine_runtime import EngineRuntime
    from edge_agent.runtimes.onnxruntime_tensor import OnnxRuntimeTensor

    class Broken:
        name, providers = "tensorrt-rtx", ["TensorRT-RTX"]
        inputs, outputs = portable.inputs, portable.outputs

        def infer(self, *_: Any) -> Any:
            raise RuntimeError("CUDA error 719: unspecified launch failure")

        def close(self) -> None:
            """Nothing is held."""

    runtime = EngineRuntime(Broken(), lambda: OnnxRuntimeTensor(graph, [], 1), lambda reason: None)
    begun = time.perf_counter()
    runtime.infer(feeds)
    return time.perf_counter() - begun


def _refused_s(module: Any, engine: Path, portable: Any, feeds: dict[str, Any]) -> float:
    """From opening a real engine, which this machine's runtime refuses, to an answer by the portable artefact."""
    begun = time.perf_counter()
    opened = module.Runtime(module.Logger(module.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(engine.read_bytes())
    if opened is not None:
        raise SystemExit("this machine opens the engine: there is no refusal to time")
    portable.infer(feeds)
    return time.perf_counter() - begun
