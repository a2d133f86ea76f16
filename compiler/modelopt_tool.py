"""Runs in the Model Optimizer's environment, not in the compiler's: `compiler.modelopt` calls it there."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np


def quantise(source: str, samples: str, out: str, precision: str) -> None:
    """Write the graph at `source` with explicit Q/DQ nodes to `out`.

    Signed and symmetric, biases float, ranges are the largest values seen; weights are stored in 8 bits, and what is
    not quantised becomes fp16; inputs and outputs stay float32.
    """
    quantize = importlib.import_module("modelopt.onnx.quantization").quantize
    with np.load(samples, allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    quantize(
        source,
        quantize_mode=precision,
        calibration_data=data,
        calibration_method="max",
        calibration_eps=["cpu"],
        high_precision_dtype="fp16",
        output_path=out,
    )
    for path in Path(out).parent.glob("*.onnx_data"):
        raise RuntimeError(f"the quantiser wrote weights beside the graph: {path.name}")
