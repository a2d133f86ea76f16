"""How long one case takes: the median over repeated runs of one session with one thread, on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from compiler.tensor_model import Array

WARM_UP_RUNS = 3
RUNS = 15


def measure_latency_ms(path: Path, inputs: dict[str, Array]) -> float:
    """Median milliseconds of the ONNX graph at `path` for the first case of `inputs` ([cases, ...] by name)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fixed = session.get_inputs()[0].shape[0]
    feeds = {name: array[: fixed if isinstance(fixed, int) else 1] for name, array in inputs.items()}
    times = []
    for _ in range(WARM_UP_RUNS + RUNS):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - started)
    return 1000 * median(times[WARM_UP_RUNS:])
