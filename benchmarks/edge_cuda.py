"""ONNX Runtime's CUDA provider on a device: each artefact gives there what it gives on the CPU, and how fast it is.

MobileNetV2 as fp32, fp16 and int8 Q/DQ (signed, for GPUs), batch 1 and 32, with and without CUDA graphs; inputs are the
golden photographs, shifted and mirrored. Outputs are compared without TF32, latencies are with it. int8 has no goal:
this provider does not fuse Q/DQ pairs, so it is slower than fp16 and rounds otherwise than a CPU's integer kernels.
`--device cpu` runs the same code on the CPU provider, which proves the script, not the speed. `scripts/edge-gpu-check`
prepares the files (`prepare`) and runs this where the GPU is.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Goal

DEVICES = ("cpu", "cuda")
GOALS = [
    Goal("fp32_top1_agreement", 0.99, ">="),
    Goal("fp16_top1_agreement", 0.99, ">="),
    Goal("fp16_speedup_vs_int8", 1.0, ">="),
    Goal("num_on_device", 3, ">="),
]
FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "edge-gpu"
SCHEMES = ("fp32", "fp16", "int8")
BATCHES = (1, 32)
PROVIDER_BY_DEVICE = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
Array = np.ndarray[Any, Any]


def run(quick: bool, device: str = "cpu") -> dict[str, float]:
    """Figures by name; latencies are medians."""
    num_inputs, num_runs = (16, 10) if quick else (96, 200)
    inputs = np.ascontiguousarray(_photographs()[:num_inputs])
    figures: dict[str, float] = {"num_on_device": 0.0}
    for scheme in SCHEMES:
        session = _session(FOLDER / f"{scheme}.onnx", device)
        figures["num_on_device"] += session.get_providers()[0] == PROVIDER_BY_DEVICE[device]
        wanted = _outputs(_session(FOLDER / f"{scheme}.onnx", "cpu"), inputs)
        exact = _session(FOLDER / f"{scheme}.onnx", device, {"use_tf32": "0"} if device == "cuda" else None)
        got = _outputs(exact, inputs)
        figures[f"{scheme}_top1_agreement"] = float(np.mean(got.argmax(-1) == wanted.argmax(-1)))
        figures[f"{scheme}_cosine"] = float(
            np.mean(np.sum(got * wanted, -1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(wanted, axis=-1))
        )
        for batch in BATCHES:
            figures[f"{scheme}_batch_{batch}_ms"] = _latency_ms(session, device, batch, num_runs)
        if device == "cuda":
            graph_ms = _graph_ms(FOLDER / f"{scheme}.onnx", num_runs)
            figures |= {} if graph_ms is None else {f"{scheme}_graph_batch_1_ms": graph_ms}
    figures["fp16_speedup_vs_int8"] = figures["int8_batch_1_ms"] / figures["fp16_batch_1_ms"]
    return figures


def prepare(source: Path) -> None:
    """Write the three schemes of the classifier at `source` into `FOLDER`. Needs the compiler's packages."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.float16 import convert_float_to_float16

    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.copy(source.with_name(f"{source.stem}.golden.npz"), FOLDER / "golden.npz")
    ready = FOLDER / "fp32.onnx"
    quant_pre_process(str(source), str(ready))
    onnx.save(convert_float_to_float16(onnx.load(str(ready)), keep_io_types=True), str(FOLDER / "fp16.onnx"))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(_photographs()[:24])
            self._name = onnx.load(str(ready), load_external_data=False).graph.input[0].name

        def get_next(self) -> dict[str, Array] | None:
            row = next(self._rows, None)
            return None if row is None else {self._name: np.ascontiguousarray(row[None])}

    quantize_static(
        str(ready),
        str(FOLDER / "int8.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )


def _photographs() -> Array:
    """The golden inputs in 16 variants each: [96, 3, 224, 224]."""
    with np.load(FOLDER / "golden.npz", allow_pickle=False) as archive:
        plain = next(archive[name] for name in archive.files if name.startswith("input."))
    shifted = [np.roll(plain, 12 * step, axis=3) for step in range(8)]
    return np.concatenate([*shifted, *(part[..., ::-1] for part in shifted)])


def _graph_ms(path: Path, num_runs: int) -> float | None:
    """Latency as one CUDA graph; None where a node must stay on the CPU. A fixed batch folds shape arithmetic away."""
    try:
        session = _session(path, "cuda", {"enable_cuda_graph": "1"}, batch=1)
        return _latency_ms(session, "cuda", 1, num_runs)
    except Exception as error:  # noqa: BLE001 - a graph that cannot be captured is a finding, not a failure
        print(f"{path.name} does not run as a CUDA graph: {str(error)[-160:]}", file=sys.stderr)
        return None


def _session(path: Path, device: str, settings: dict[str, str] | None = None, batch: int | None = None) -> Any:
    import onnxruntime

    if device == "cuda":
        import torch  # noqa: F401 - its wheels hold the CUDA libraries that the provider needs

        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    providers: list[Any] = [(PROVIDER_BY_DEVICE[device], settings or {})]
    if device != "cpu":
        providers.append("CPUExecutionProvider")
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if session.get_providers()[0] != PROVIDER_BY_DEVICE[device]:
        print(f"{path.name} runs on {session.get_providers()[0]}, not on {device}", file=sys.stderr)
    return session


def _outputs(session: Any, inputs: Array) -> Array:
    name = session.get_inputs()[0].name
    parts: Sequence[Array] = [session.run(None, {name: inputs[at : at + 16]})[0] for at in range(0, len(inputs), 16)]
    return np.concatenate(parts).astype(np.float32)


def _latency_ms(session: Any, device: str, batch: int, num_runs: int) -> float:
    """Median of single runs on bound device buffers; the first ones (tuning, graph capture) do not count."""
    import onnxruntime

    place = "cpu" if device == "cpu" else "cuda"
    photographs = np.resize(_photographs(), (batch, 3, 224, 224))
    inputs = onnxruntime.OrtValue.ortvalue_from_numpy(photographs, place, 0)
    shape = [batch, *session.get_outputs()[0].shape[1:]]
    outputs = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, place, 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, inputs)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, outputs)
    times_ms = []
    for number in range(num_runs + 5):
        begin = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if number >= 5:
            times_ms.append((time.perf_counter() - begin) * 1000)
    return float(np.median(times_ms))


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
