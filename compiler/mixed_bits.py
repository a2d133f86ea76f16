"""Raising layers of a 4-bit language model to 8 bits: their kernels and weights are taken from its 8-bit twin.

Both are graphs of the same model by the same builder, so a layer is found by the value that it reads and the kind of
projection that it is. The builder itself knows only one mixed layout; this makes any.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx

from wire.errors import UnsupportedModelError

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
_KERNEL = "MatMulNBits"
_WIDTH = re.compile(r"_Q[48]$")


def layers_by_bits(folder: Path) -> dict[str, int]:
    """Name of each layer with packed weights (such as "/model/layers.0/mlp/down_proj/MatMul") and its bits."""
    graph = onnx.load(str(folder / GRAPH), load_external_data=False).graph
    return {_layer(node): _bits(node) for node in graph.node if node.op_type == _KERNEL}


def raise_to_eight_bits(four: Path, eight: Path, layers: Collection[str], out: Path) -> None:
    """Write the artefact in folder `four` to folder `out` (new) with `layers` as they are in folder `eight`.

    A layer that one of them does not have raises `UnsupportedModelError`.
    """
    shutil.copytree(four, out, ignore=lambda _, names: {GRAPH, WEIGHTS} & set(names))
    model = onnx.load(str(four / GRAPH))
    donors = onnx.load(str(eight / GRAPH))
    donor_by_layer = {_layer(node): node for node in donors.graph.node if node.op_type == _KERNEL}
    donor_weights = {tensor.name: tensor for tensor in donors.graph.initializer}
    own = {_layer(node) for node in model.graph.node if node.op_type == _KERNEL}
    missing = set(layers) - (own & set(donor_by_layer))
    if missing:
        raise UnsupportedModelError(f"no layer {sorted(missing)[0]!r} in both graphs", remedy="see its 8-bit build")
    for node in model.graph.node:
        if node.op_type == _KERNEL and _layer(node) in layers:
            _replace(node, donor_by_layer[_layer(node)], model.graph, donor_weights)
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, str(out / GRAPH), save_as_external_data=True, location=WEIGHTS, size_threshold=1024)


def _replace(node: Any, donor: Any, graph: Any, donor_weights: dict[str, Any]) -> None:
    names = []
    for name in donor.input[1:]:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(donor_weights[name])
        tensor.name = f"{name}.8bit"
        graph.initializer.append(tensor)
        names.append(tensor.name)
    node.input[:] = [node.input[0], *names]
    del node.attribute[:]
    node.attribute.extend(donor.attribute)
    node.name = donor.name


def _layer(node: Any) -> str:
    return _WIDTH.sub("", node.name)


def _bits(node: Any) -> int:
    return int(next(attribute.i for attribute in node.attribute if attribute.name == "bits"))
