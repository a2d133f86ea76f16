"""Numbers that no artefact may hold: NaN and infinity in weights, scales and norms.

Integer kernels saturate instead of spreading an infinite scale, so outputs on one machine may look right while another
device computes something else. Constants of other nodes are left alone: masks hold minus infinity on purpose.
"""

from __future__ import annotations

from pathlib import Path

_JUDGED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "QuantizeLinear", "DequantizeLinear", "MatMulNBits")
_JUDGED_TOO = ("GatherBlockQuantized", "Normalization")


def count_broken_numbers(path: Path) -> int:
    """How many NaN and infinite values the judged initialisers of the graph at `path` hold, external data included."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    read = {
        name
        for node in model.graph.node
        if node.op_type in _JUDGED or any(part in node.op_type for part in _JUDGED_TOO)
        for name in node.input
    }
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    judged = (one for one in model.graph.initializer if one.name in read and one.data_type in floats)
    return sum(int((~np.isfinite(numpy_helper.to_array(one))).sum()) for one in judged)
