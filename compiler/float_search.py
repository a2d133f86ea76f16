"""Which layers of an 8-bit tensor model stay float, when no rung of the recipe's ladder holds the gates.

`compiler.sensitivity` decides what to try; here a set of layers is quantised, measured and judged, all in cached
stages. The loss is the worst gate's share of what its limit allows: a set holds exactly when that is at most 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from compiler.cache import Built
from compiler.sensitivity import Evaluation, Layers, SearchResult, budget, search
from model_registry.manifest import GateResult

MODEL = "model.onnx"
NOT_ACCURACY = ("integer_layer_share", "size_ratio")
_TINY = 1e-9

Quantise = Callable[[Sequence[str]], Built]
Measure = Callable[[Built], Mapping[str, float]]
Judge = Callable[[Mapping[str, float], Built], list[GateResult]]


@dataclass(frozen=True)
class Found:
    """The graph with the fewest bytes whose gates hold, and how it was found."""

    graph: Built
    gates: list[GateResult]
    result: SearchResult


def search_float_layers(layers: Sequence[str], quantise: Quantise, measure: Measure, judge: Judge) -> Found | None:
    """The best set of float layers among `layers`, or None when no set holds the gates."""

    def size(graph: Built) -> int:
        return graph.path(MODEL).stat().st_size

    return search_layers(layers, quantise, measure, judge, size, NOT_ACCURACY)


def search_layers(
    layers: Sequence[str],
    quantise: Quantise,
    measure: Measure,
    judge: Judge,
    size_bytes: Callable[[Built], int],
    not_accuracy: Collection[str],
) -> Found | None:
    """The smallest model by `size_bytes` that keeps some of `layers` in higher precision and holds the gates, or None.

    Gates that bound how much may be kept (`not_accuracy`) are no loss, because keeping all layers must be able to
    hold; they stand in the result for the caller to require. Costs at most `budget(len(layers))` evaluations, each of
    which quantises and measures once.
    """
    graphs: dict[Layers, tuple[Built, list[GateResult]]] = {}

    def evaluate(kept: Layers) -> Evaluation:
        graph = quantise(sorted(kept))
        gates = judge(measure(graph), graph)
        graphs[kept] = (graph, gates)
        return Evaluation(size_bytes(graph), max(strain(gate) for gate in gates if gate.name not in not_accuracy))

    result = search(layers, evaluate, lambda evaluation: evaluation.loss <= 1, budget(len(layers)))
    if result.kept is None:
        return None
    graph, gates = graphs[result.kept]
    return Found(graph, gates, result)


def strain(result: GateResult) -> float:
    """How much of what a gate's limit allows is used: above 1 it does not hold. ">=" gates are shares of 1."""
    if result.sense == "<=":
        return result.value / max(_TINY, result.limit)
    return (1 - result.value) / max(_TINY, 1 - result.limit)
