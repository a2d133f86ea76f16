"""Engines of TensorRT and TensorRT-RTX, opened by the package's own runtime.

One execution context and one stream, used by one request at a time; device memory comes from the CUDA driver
(`cuda_driver`), is kept as long as shapes stay the same, and an axis without a length takes the request's. What the
runtime refuses (another version, another compute capability, no GPU) is an `EngineRefusedError` in its own words.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.engine_runtime import EngineRefusedError
from edge_agent.runtimes.base import NUMPY_BY_DATATYPE, Array, Memory, TensorSpec
from edge_agent.runtimes.cuda_driver import Buffer, CudaDriver
from wire.errors import InvalidInputError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
_DATATYPES = {
    "FLOAT": "FP32", "HALF": "FP16", "INT8": "INT8", "UINT8": "UINT8", "INT32": "INT32", "INT64": "INT64",
    "BOOL": "BOOL",
}  # fmt: skip
MAX_LINES = 5


def open_engine(path: Path, runtime: str) -> TensorRtEngine:
    """Deserialise the engine at `path` by `runtime` ("tensorrt" or "tensorrt-rtx")."""
    trt: Any = importlib.import_module(MODULES[runtime])
    log = _log(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        said = "; ".join(log.lines[-MAX_LINES:]) or "it gives no reason"
        raise EngineRefusedError(
            f"{runtime} {trt.__version__} does not take the engine: {said}", remedy="build it here"
        )
    return TensorRtEngine(trt, engine, runtime, CudaDriver(), path.stat().st_size)


class TensorRtEngine:
    """A `TensorRuntime` of one deserialised engine."""

    def __init__(self, trt: Any, engine: Any, runtime: str, cuda: CudaDriver, weights_bytes: int) -> None:
        self.name = runtime
        self.providers = [f"{runtime} {trt.__version__}"]
        self._engine, self._cuda, self._weights_bytes = engine, cuda, weights_bytes
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            raise EngineRefusedError("the engine gives no execution context", remedy="free memory of the GPU")
        self._lock = threading.Lock()
        self._buffers: dict[str, Buffer] = {}
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self.inputs: Sequence[TensorSpec] = [
            self._spec(one) for one in names if engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT
        ]
        self.outputs: Sequence[TensorSpec] = [
            self._spec(one) for one in names if engine.get_tensor_mode(one) == trt.TensorIOMode.OUTPUT
        ]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Run the engine once."""
        self._check(inputs, outputs)
        with self._lock:
            self._cuda.enter()
            for spec in self.inputs:
                given = np.ascontiguousarray(inputs[spec.name])
                if not self._context.set_input_shape(spec.name, given.shape):
                    raise InvalidInputError(
                        f"input {spec.name!r} has shape {list(given.shape)}", remedy=f"send {list(spec.shape)}"
                    )
                self._buffer(spec.name, given.nbytes).write(given)
            found = {spec.name: self._room(spec) for spec in self.outputs}
            if not self._context.execute_async_v3(self._cuda.stream):
                raise RuntimeError("the engine did not run")
            self._cuda.synchronise()
            for name, room in found.items():
                self._buffers[name].read(room)
            return {name: found[name] for name in outputs or found}

    def memory(self) -> Memory:
        """The file's size stands for the weights; buffers as allocated, all on the device."""
        return Memory(self._weights_bytes, sum(buffer.size_bytes for buffer in list(self._buffers.values())))

    def close(self) -> None:
        """Free the engine and its memory."""
        with self._lock:
            for buffer in self._buffers.values():
                buffer.free()
            self._buffers.clear()
            self._context = self._engine = None
            self._cuda.close()

    def _room(self, spec: TensorSpec) -> Array:
        """Memory here and on the device for an output of the shape that the inputs make."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        room: Array = np.empty(shape, NUMPY_BY_DATATYPE[spec.datatype])
        self._buffer(spec.name, room.nbytes)
        return room

    def _buffer(self, name: str, size_bytes: int) -> Buffer:
        held = self._buffers.get(name)
        if held is None or held.size_bytes < size_bytes:
            if held is not None:
                held.free()
            held = self._buffers[name] = self._cuda.allocate(size_bytes)
        self._context.set_tensor_address(name, held.address)
        return held

    def _spec(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DATATYPES:
            raise EngineRefusedError(f"tensor {name!r} is of type {kind}", remedy="cast it in the graph")
        return TensorSpec(name, _DATATYPES[kind], tuple(self._engine.get_tensor_shape(name)))

    def _check(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> None:
        unknown = set(outputs) - {spec.name for spec in self.outputs}
        if unknown or set(inputs) != {spec.name for spec in self.inputs}:
            raise InvalidInputError(
                f"inputs {sorted(inputs)} or outputs {sorted(unknown)} do not match the model",
                remedy=f"wanted {[spec.name for spec in self.inputs]} -> {[spec.name for spec in self.outputs]}",
            )
        for spec in self.inputs:
            value = inputs[spec.name]
            fits = len(value.shape) == len(spec.shape) and all(
                want in (-1, have) for want, have in zip(spec.shape, value.shape, strict=True)
            )
            if value.dtype.name != NUMPY_BY_DATATYPE[spec.datatype] or not fits:
                raise InvalidInputError(
                    f"input {spec.name!r} is {value.dtype}{list(value.shape)}",
                    remedy=f"send {spec.datatype}{list(spec.shape)}",
                )


def _log(trt: Any) -> Any:
    """A TensorRT logger that keeps what went wrong."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.lines.append(message)

    return Log()
