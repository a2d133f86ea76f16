"""Tensor models in ONNX Runtime: the wanted providers that really load, the CPU always last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edge_agent.runtimes.base import NUMPY_BY_DATATYPE, Array, TensorSpec
from wire.errors import InvalidInputError, UnsupportedModelError

_DATATYPE_BY_ONNX = {
    "tensor(float)": "FP32",
    "tensor(float16)": "FP16",
    "tensor(double)": "FP64",
    "tensor(bool)": "BOOL",
    **{f"tensor({sign}int{bits})": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


class OnnxRuntimeTensor:
    """One inference session."""

    name = "onnxruntime"

    def __init__(self, path: Path, providers: Sequence[str], num_threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        present = onnxruntime.get_available_providers()
        wanted = [name for name in providers if name in present and name != "CPUExecutionProvider"]
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=[*wanted, "CPUExecutionProvider"]
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"the model does not load: {error}", remedy="compile it for this device"
            ) from error
        self.providers = list(self._session.get_providers())
        self.inputs: Sequence[TensorSpec] = [_spec(value) for value in self._session.get_inputs()]
        self.outputs: Sequence[TensorSpec] = [_spec(value) for value in self._session.get_outputs()]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Run the model once."""
        names = list(outputs) or [spec.name for spec in self.outputs]
        unknown = set(names) - {spec.name for spec in self.outputs}
        if unknown or set(inputs) != {spec.name for spec in self.inputs}:
            raise InvalidInputError(
                f"inputs {sorted(inputs)} or outputs {sorted(unknown)} do not match the model",
                remedy=f"wanted {[spec.name for spec in self.inputs]} -> {[spec.name for spec in self.outputs]}",
            )
        for spec in self.inputs:
            _check(spec, inputs[spec.name])
        results = self._session.run(names, dict(inputs))
        return dict(zip(names, (np.asarray(result) for result in results), strict=True))

    def close(self) -> None:
        """Free the session."""
        self._session = None


def _check(spec: TensorSpec, value: Array) -> None:
    if value.dtype.name != NUMPY_BY_DATATYPE.get(spec.datatype):
        raise InvalidInputError(f"input {spec.name!r} has type {value.dtype}", remedy=f"send {spec.datatype}")
    fits = len(value.shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, value.shape, strict=True)
    )
    if not fits:
        raise InvalidInputError(f"input {spec.name!r} has shape {list(value.shape)}", remedy=f"send {list(spec.shape)}")


def _spec(value: Any) -> TensorSpec:
    shape = tuple(length if isinstance(length, int) and length > 0 else -1 for length in value.shape)
    return TensorSpec(value.name, _DATATYPE_BY_ONNX.get(value.type, "BYTES"), shape)
