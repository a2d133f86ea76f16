"""LoRA adapters, applied when a model is loaded: every `*.onnx_adapter` in its folder.

A graph that takes adapters has their matrices as initializers that may be given from outside (Hu et al., 2021; the file
is ONNX Runtime's own format). A matrix that the graph does not know, or that two adapters set, is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from edge_agent.runtimes.base import Array
from wire.errors import UnsupportedModelError

PATTERN = "*.onnx_adapter"


def read_adapters(folder: Path, session: Any) -> dict[str, Array]:
    """Matrices by the name of the initializer they replace; empty without adapters."""
    found: dict[str, Array] = {}
    shape_by_name = {value.name: list(value.shape) for value in session.get_overridable_initializers()}
    for path in sorted(folder.glob(PATTERN)):
        for name, value in _parameters(path).items():
            if name in found or shape_by_name.get(name) != list(value.shape):
                wanted = "set twice" if name in found else f"{shape_by_name.get(name, 'absent')} in the graph"
                raise UnsupportedModelError(
                    f"{path.name}: {name} {list(value.shape)} is {wanted}", remedy="ship the adapter of this model"
                )
            found[name] = value
    return found


def _parameters(path: Path) -> dict[str, Array]:
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        # copied while the adapter, whose memory the values show, is there
        return {name: value.numpy().copy() for name, value in adapter.get_parameters().items()}
    except Exception as error:
        raise UnsupportedModelError(f"{path.name} is no adapter: {error}", remedy="make it again") from error
