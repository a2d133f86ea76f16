"""Static 8-bit quantisation of ONNX graphs with explicit Q/DQ nodes, and proof that it took effect.

The scheme comes from the target. Ranges are moving averages over fixed calibration batches: outliers of single crops
do not widen them, and the same input gives the same bytes. The classifier's output stays float, because 8 bits tie
neighbouring classes. `count_integer_kernels` looks at the graph that ONNX Runtime really executes.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from compiler.targets import TensorScheme

BATCH = 8
_WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")
_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")
_TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}


class _Batches(CalibrationDataReader):
    def __init__(self, input_name: str, samples: np.ndarray[Any, Any]) -> None:
        self._batches: Iterator[dict[str, Any]] = (
            {input_name: samples[start : start + BATCH]} for start in range(0, len(samples) // BATCH * BATCH, BATCH)
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def quantise(
    source: Path, out: Path, scheme: TensorScheme, samples: np.ndarray[Any, Any], *, num_float_layers: int = 0
) -> None:
    """Write `source` with 8-bit weights and activations to `out`; `samples` is [num_samples, ...] of its only input.

    The first `num_float_layers` layers with weights, in graph order, keep float numbers.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(prepared), load_external_data=False).graph
        quantize_static(
            str(prepared),
            str(out),
            _Batches(graph.input[0].name, samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=scheme.reduce_range,
            activation_type=_TYPES[scheme.activations],
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_head(graph, num_float_layers),
            extra_options={
                "ActivationSymmetric": scheme.activations == "int8",
                "WeightSymmetric": True,
                "QuantizeBias": scheme.quantise_bias,
                "CalibMovingAverage": True,
                "OpTypesToExcludeOutputQuantization": ["Gemm"],
            },
        )


def _head(graph: Any, num_layers: int) -> list[str]:
    """Names of all nodes up to and including the `num_layers`-th one with weights."""
    names: list[str] = []
    seen = 0
    for node in graph.node:
        is_weighted = node.op_type in _WEIGHTED
        if seen == num_layers and (is_weighted or num_layers == 0):
            break
        seen += is_weighted
        names.append(node.name)
    return names


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
    return integer, sum(counts[kind] for kind in (*_WEIGHTED, "FusedConv", "FusedGemm", "FusedMatMul"))
