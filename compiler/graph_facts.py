"""What a graph asks of a runtime, read from the ONNX file without its weights; goes into the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from model_registry.manifest import Graph, NumberFormat

STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training")
_USES: Mapping[str, Mapping[int, str]] = {
    "GroupQueryAttention": {
        9: "position_ids", 10: "attention_bias", 11: "head_sink", 12: "quantised_kv", 13: "quantised_kv",
        14: "qk_norm", 15: "qk_norm",
    }
}  # fmt: skip
"""Operator -> place of an optional input -> the name of what it is used for."""

_FORMATS: Mapping[int, NumberFormat] = {
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E4M3FNUZ: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
    TensorProto.FLOAT8E5M2FNUZ: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
}


def read_graph(folder: Path, entry: str) -> Graph:
    """The facts of the graph that a runtime opens: `entry` below `folder`, or the model of a genai folder (".")."""
    if entry != ".":
        return graph_facts(onnx.load(str(folder / entry), load_external_data=False))
    config = json.loads((folder / "genai_config.json").read_text())
    return graph_facts(onnx.load(str(folder / config["model"]["decoder"]["filename"]), load_external_data=False))


def graph_facts(model: onnx.ModelProto) -> Graph:
    """The facts of a graph in memory."""
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    own = {(function.domain, function.name) for function in model.functions}
    operators = {use for node in nodes if (node.domain, node.op_type) not in own for use in _operator(node)}
    return Graph(
        ir_version=model.ir_version,
        opsets={one.domain or "ai.onnx": one.version for one in model.opset_import},
        operators=sorted(operators),
        formats=sorted(_formats(model, nodes)),
    )


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from graphs_of(inner)


def _operator(node: onnx.NodeProto) -> Iterator[str]:
    if node.domain in STANDARD_DOMAINS:
        return
    name = f"{node.domain}.{node.op_type}"
    yield name
    for place, use in _USES.get(node.op_type, {}).items():
        if place < len(node.input) and node.input[place]:
            yield f"{name}[{use}]"


def _formats(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> set[NumberFormat]:
    graphs = list(graphs_of(model.graph))
    type_by_name = {tensor.name: tensor.data_type for graph in graphs for tensor in graph.initializer}
    kinds = set(type_by_name.values())
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            kinds.add(value.type.tensor_type.elem_type)
    for node in nodes:
        kinds |= {attribute.i for attribute in node.attribute if attribute.name in ("to", "output_dtype")}
        kinds |= {attribute.t.data_type for attribute in node.attribute if attribute.HasField("t")}
        kinds |= {tensor.data_type for attribute in node.attribute for tensor in attribute.tensors}
    found = {_FORMATS[kind] for kind in kinds if kind in _FORMATS}
    if any(_is_bias(node, type_by_name) for node in nodes):
        found.add("int32_bias")
    return found


def _is_bias(node: onnx.NodeProto, type_by_name: Mapping[str, int]) -> bool:
    return node.op_type == "DequantizeLinear" and type_by_name.get(node.input[0]) == TensorProto.INT32
