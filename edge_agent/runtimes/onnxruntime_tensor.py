"""Tensor models in ONNX Runtime: a proven provider, buffers that are reused, requests batched where the graph allows.

Batching is proven, not assumed: the first axis must be free in all inputs and outputs, and a run of two rows must give
what two runs give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edge_agent.runtimes.base import NUMPY_BY_DATATYPE, Array, Memory, TensorSpec
from edge_agent.runtimes.providers import Opened, cache_settings, open_proven
from edge_agent.runtimes.tensor_lanes import TensorLanes
from wire.errors import InvalidInputError

NUM_LANES = 2
"""Runs at once: a second one fills the gaps of the first."""

MAX_BATCH = 8
PROBE_TOLERANCE = 1e-2  # of the largest output: integer kernels round differently in another batch
MAX_PROBE_VALUES = 1 << 24
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

    def __init__(
        self, path: Path, providers: Sequence[str], num_threads: int, *, hardware_key: str | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 4  # what a provider has to say is in `tried`
        caches = cache_settings(path.parent.parent / "engines", hardware_key) if hardware_key and providers else None
        opened: Opened = open_proven(path, providers, options, _probe, caches)
        self._session: Any = opened.session
        self.tried = opened.tried
        self.providers = list(self._session.get_providers())
        self.inputs: Sequence[TensorSpec] = [_spec(value) for value in self._session.get_inputs()]
        self.outputs: Sequence[TensorSpec] = [_spec(value) for value in self._session.get_outputs()]
        self.is_batched = self._proves_batching()
        self._buffers: dict[tuple[int, str], Array] = {}
        self._lanes = TensorLanes(self._run, NUM_LANES, MAX_BATCH if self.is_batched else 1)
        self._weights_bytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))

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
        results = self._lanes.infer(inputs)
        return {name: results[name] for name in names}

    def memory(self) -> Memory:
        """Weights and reused buffers."""
        return Memory(self._weights_bytes, sum(buffer.nbytes for buffer in list(self._buffers.values())))

    def close(self) -> None:
        """Free the session."""
        self._session = None
        self._buffers.clear()

    def _run(self, lane: int, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One run on a lane: outputs of known shape are written into the lane's buffers and copied from there."""
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        num_rows = len(next(iter(inputs.values()), ()))
        kept = {}
        for spec in self.outputs:
            shape = (num_rows, *spec.shape[1:]) if self.is_batched else spec.shape
            if spec.datatype == "BYTES" or any(length < 0 for length in shape):
                binding.bind_output(spec.name, "cpu")
                continue
            kept[spec.name] = buffer = self._buffer(lane, spec, shape)
            binding.bind_output(spec.name, "cpu", 0, buffer.dtype, shape, buffer.ctypes.data)
        self._session.run_with_iobinding(binding)
        loose = zip((spec.name for spec in self.outputs), binding.get_outputs(), strict=True)
        return {name: kept[name].copy() if name in kept else value.numpy() for name, value in loose}

    def _buffer(self, lane: int, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
        """The first rows of the lane's buffer for an output."""
        key = (lane, spec.name)
        if key not in self._buffers or (len(shape) and len(self._buffers[key]) < shape[0]):
            self._buffers[key] = np.empty(shape, NUMPY_BY_DATATYPE[spec.datatype])
        buffer = self._buffers[key]
        return buffer[: shape[0]] if shape else buffer

    def _proves_batching(self) -> bool:
        specs = [*self.inputs, *self.outputs]
        if not all(spec.shape and spec.shape[0] == -1 and spec.datatype != "BYTES" for spec in specs):
            return False
        rows = [_example(spec, seed) for seed in (0, 1) for spec in self.inputs]
        first, second = rows[: len(self.inputs)], rows[len(self.inputs) :]
        names = [spec.name for spec in self.inputs]
        try:
            alone = [self._session.run(None, dict(zip(names, row, strict=True))) for row in (first, second)]
            pairs = (np.concatenate(pair) for pair in zip(first, second, strict=True))
            together = self._session.run(None, dict(zip(names, pairs, strict=True)))
        except Exception:  # noqa: BLE001 - a graph that refuses two rows is simply not batched
            return False
        return all(_agree(np.concatenate(pair), joined) for *pair, joined in zip(*alone, together, strict=True))


def _agree(apart: Array, together: Array) -> bool:
    if apart.shape != together.shape:
        return False
    limit = PROBE_TOLERANCE * max(float(np.abs(apart.astype(np.float64)).max(initial=0.0)), 1e-6)
    return bool(np.allclose(apart.astype(np.float64), together.astype(np.float64), rtol=0, atol=limit))


def _probe(session: Any) -> None:
    """One run on an example, which also warms the session up; graphs that want more than shapes tell are let pass."""
    specs = [_spec(value) for value in session.get_inputs()]
    if any(spec.datatype == "BYTES" for spec in specs):
        return
    session.run(None, {spec.name: _example(spec, 0) for spec in specs})


def _example(spec: TensorSpec, seed: int) -> Array:
    """A row of values that every kind of input takes: small numbers, free axes of length 1."""
    shape = [max(length, 1) for length in spec.shape]
    if np.prod(shape) > MAX_PROBE_VALUES:
        raise InvalidInputError(f"input {spec.name!r} has shape {shape}", remedy="use a smaller one")
    numbers = np.random.default_rng(seed).random(shape)
    kind = np.dtype(NUMPY_BY_DATATYPE[spec.datatype])
    return (numbers if kind.kind == "f" else np.zeros(shape) + seed).astype(kind)


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
