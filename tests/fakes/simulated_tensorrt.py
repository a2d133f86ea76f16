"""TensorRT as a Jetson has it, simulated: a builder command and a runtime module, for the true protocol around them.

An engine here is a magic line and the graph; "deserialising" it opens the graph in ONNX Runtime. Faults come from the
file that `SIMULATED_TENSORRT` names (one word), every opening of an engine is noted in the file of the same name with
`.opened`: what a test asks to know that a foreign engine was never opened.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_registry.manifest import sha256

if TYPE_CHECKING:
    from edge_agent.runtimes.base import Array, Memory

MAGIC = b"simulated TensorRT engine\n"
VARIABLE = "SIMULATED_TENSORRT"


def _fault() -> str:
    name = os.environ.get(VARIABLE)
    return Path(name).read_text().strip() if name and Path(name).exists() else ""


def build(graph: bytes, fault: str = "") -> bytes:
    """The engine of a graph; a wrong one computes other numbers."""
    if fault == "wrong":
        import onnx
        from onnx import numpy_helper

        model = onnx.load_from_string(graph)
        for weight in model.graph.initializer:
            if weight.data_type == onnx.TensorProto.FLOAT:
                weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
        graph = model.SerializeToString()
    return b"damaged" if fault == "garbage" else MAGIC + graph


class SimulatedEngine:
    """What `open_engine` gives."""

    name = "tensorrt"

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        name = os.environ.get(VARIABLE)
        if name:
            with Path(f"{name}.opened").open("a") as log:
                log.write(sha256(data) + "\n")
        if not data.startswith(MAGIC):
            raise RuntimeError("magic tag does not match")
        from edge_agent.runtimes.onnxruntime_tensor import OnnxRuntimeTensor

        graph = path.with_name(f"{path.name}.{os.getpid()}.graph")
        graph.write_bytes(data.removeprefix(MAGIC))
        self._session = OnnxRuntimeTensor(graph, [], 1)
        graph.unlink()
        self.providers = ["SimulatedTensorrt"]
        self.inputs, self.outputs = self._session.inputs, self._session.outputs

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Answer, unless a fault is wanted."""
        if _fault() == "break":
            raise RuntimeError("CUDA error 719: unspecified launch failure")
        return self._session.infer(inputs, outputs)

    def memory(self) -> Memory:
        """The graph's."""
        return self._session.memory()

    def close(self) -> None:
        """Free the session."""
        self._session.close()


def open_engine(path: Path, runtime: str) -> Any:
    """The module's one promise."""
    assert runtime == "tensorrt"
    return SimulatedEngine(path)


def main() -> None:
    """The builder's command: GRAPH ENGINE."""
    graph, engine = map(Path, sys.argv[1:3])
    fault = _fault()
    if fault == "slow":
        time.sleep(600)
    if fault == "refuse":
        sys.exit("no kernel for this layer")
    engine.write_bytes(build(graph.read_bytes(), fault))


if __name__ == "__main__":
    main()
