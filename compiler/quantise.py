"""Static 8-bit quantisation of ONNX graphs with explicit Q/DQ nodes, and proof that it took effect.

Ranges are collected once and serve every scheme: they are moving averages over fixed calibration batches, so outliers
of single crops do not widen them and the same input gives the same bytes. The scheme comes from the target. The
classifier's output stays float, because 8 bits tie neighbouring classes. `count_integer_kernels` looks at the graph
that ONNX Runtime really executes.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from compiler.targets import TensorScheme

BATCH = 8
Array = np.ndarray[Any, Any]
PREPARED = "prepared.onnx"
RANGES = "ranges.json"
LAYERS = "layers.json"
WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")
_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")
_TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
_CALIBRATION = {"CalibMovingAverage": True, "OpTypesToExcludeOutputQuantization": ["Gemm"]}


class _Batches(CalibrationDataReader):
    def __init__(self, samples: Mapping[str, Array]) -> None:
        count = len(next(iter(samples.values()))) // BATCH * BATCH
        self._batches: Iterator[dict[str, Any]] = (
            {name: array[start : start + BATCH] for name, array in samples.items()} for start in range(0, count, BATCH)
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def calibrate(source: Path, out: Path, samples: Mapping[str, Array]) -> None:
    """Write the graph prepared for quantisation, its layers with weights and its values' ranges into the folder `out`.

    `samples` are [num_samples, ...] by input.
    """
    prepared = out / PREPARED
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        quantize_static(
            str(prepared),
            str(Path(folder) / "unused.onnx"),
            _Batches(samples),
            quant_format=QuantFormat.QDQ,
            calibration_cache_path=str(out / RANGES),
            extra_options=_CALIBRATION,
        )
    (out / LAYERS).write_text(json.dumps(_segments(prepared)))


def _segments(prepared: Path) -> dict[str, list[str]]:
    """By layer with weights: it and the nodes after it up to the next one, in graph order; the first has all before."""
    segments: dict[str, list[str]] = {}
    before: list[str] = []
    for node in onnx.load(str(prepared), load_external_data=False).graph.node:
        before.append(node.name)
        if node.op_type in WEIGHTED:
            segments[node.name] = before if not segments else [node.name]
            before = segments[node.name]
    return segments


def quantise(calibrated: Path, out: Path, scheme: TensorScheme, floats: Collection[str] = ()) -> None:
    """Write the graph of the folder `calibrated` with 8-bit weights and activations to `out`.

    The nodes named in `floats` keep float numbers.
    """
    quantize_static(
        str(calibrated / PREPARED),
        str(out),
        None,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=scheme.reduce_range,
        activation_type=_TYPES[scheme.activations],
        weight_type=QuantType.QInt8,
        nodes_to_exclude=sorted(floats),
        calibration_cache_path=str(calibrated / RANGES),
        extra_options={
            **_CALIBRATION,
            "ActivationSymmetric": scheme.activations == "int8",
            "WeightSymmetric": True,
            "QuantizeBias": scheme.quantise_bias,
        },
    )


def float_nodes(calibrated: Path, layers: int | Collection[str]) -> list[str]:
    """Nodes that stay float so that the first so many layers with weights, or the named ones, do."""
    segments: dict[str, list[str]] = json.loads((calibrated / LAYERS).read_bytes())
    chosen = list(segments)[:layers] if isinstance(layers, int) else [name for name in segments if name in layers]
    return [node for layer in chosen for node in segments[layer]]


def cast_to_half(source: Path, out: Path) -> None:
    """Write `source` with fp16 weights and arithmetic to `out`; inputs and outputs stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    onnx.save(model, str(out))


def has_half_weights(path: Path) -> bool:
    """Whether weights of the graph at `path` are fp16."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)


def count_integer_kernels(path: Path) -> tuple[int, int]:
    """(integer kernels, float kernels) with weights in the graph that ONNX Runtime executes for `path` on this CPU."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimised)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        counts = Counter(node.op_type for node in onnx.load(str(optimised), load_external_data=False).graph.node)
    integer = sum(counts[kind] for kind in _INTEGER)
    return integer, sum(counts[kind] for kind in (*WEIGHTED, "FusedConv", "FusedGemm", "FusedMatMul"))


def count_quantised_layers(path: Path) -> tuple[int, int]:
    """(layers with weights between Q/DQ nodes, other layers with weights): what TensorRT, which reads precision from
    the graph, makes integer kernels of."""
    graph = onnx.load(str(path), load_external_data=False).graph
    dequantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    layers = [node for node in graph.node if node.op_type in WEIGHTED]
    quantised = sum(set(node.input[:2]) <= dequantised for node in layers)
    return quantised, len(layers) - quantised
