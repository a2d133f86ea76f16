"""Operator sets that a graph imports and no node uses: an older runtime refuses the graph for their version alone.

Exporters, the simplifier and ONNX Runtime's quantiser all leave such imports behind, so each stage that writes a tensor
graph ends here.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from compiler.graph_facts import graphs_of

_OWN = "ai.onnx"


def drop_unused_opsets(model: onnx.ModelProto) -> None:
    """Drop those imports in place. ai.onnx stays, because ONNX demands it; local functions' domains count as used."""
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    used = {_OWN, *(one.domain or _OWN for one in (*nodes, *model.functions))}
    kept = [one for one in model.opset_import if (one.domain or _OWN) in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def strip_file(path: Path) -> None:
    """`drop_unused_opsets` for the graph at `path`, whose weights lie inside."""
    model = onnx.load(str(path))
    drop_unused_opsets(model)
    onnx.save(model, str(path))
