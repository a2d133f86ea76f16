"""Which few layers must keep a higher precision: a search over any quantiser, and its Pareto front.

`search` is pure: it asks `evaluate` for sets of kept layers and `holds` for the verdict, and knows nothing of graphs.
It works in three phases within a budget of evaluations (`budget`: 3 * sqrt(layers) + 10):

1. nothing kept, and everything kept: whether the search is needed, and whether it can end well;
2. groups of neighbouring layers one at a time: what keeping each regains, and what it costs in bytes. With few layers
   each is a group of its own, else there are about sqrt(layers);
3. sets of groups are proposed, smallest first, that would hold if the losses' powers added up; the power is fitted so
   that the single gains sum up to the whole. A proposal that fails lowers how much of a predicted gain is believed.
   With more groups than can be enumerated only prefixes of the ranking are proposed. What was found is then thinned:
   groups and halves of groups are given back while the gates still hold.

`loss` is >= 0, may be infinite (a set that cannot be built), but is never NaN; `holds` must depend on the evaluation
alone, because it is asked about predicted ones, too. Ranking by keeping one in and refining by giving back is how
accuracy-aware quantisers search (for example NNCF's accuracy control); predicting sets saves most of the evaluations.

Who evaluates: `compiler.float_search` for layers of 8-bit tensor models that stay float. `SearchResult.evaluations` and
`front` are the trade-offs that a quality report shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

Layers = frozenset[str]
MAX_ENUMERATED_GROUPS = 12


@dataclass(frozen=True)
class Evaluation:
    """What keeping a set of layers gave. `loss` is what gates bound (say 1 - agreement, or KL): smaller is better."""

    size_bytes: int
    loss: float
    latency_ms: float | None = None

    def dominates(self, other: Evaluation) -> bool:
        """Nowhere worse and somewhere better; a latency that nobody measured is no ground."""
        pairs = [(self.size_bytes, other.size_bytes), (self.loss, other.loss)]
        if self.latency_ms is not None and other.latency_ms is not None:
            pairs.append((self.latency_ms, other.latency_ms))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@dataclass(frozen=True)
class Tried:
    """One evaluated set."""

    kept: Layers
    evaluation: Evaluation
    holds: bool


@dataclass(frozen=True)
class SearchResult:
    """`kept` is the smallest set found whose gates hold, None if not even keeping all layers holds."""

    kept: Layers | None
    evaluations: tuple[Tried, ...]
    front: tuple[Tried, ...]


Evaluate = Callable[[Layers], Evaluation]
Holds = Callable[[Evaluation], bool]


def budget(num_layers: int) -> int:
    """How many evaluations a search may cost: 3 * sqrt(layers) + 10."""
    return math.floor(3 * math.sqrt(num_layers)) + 10


def search(layers: Sequence[str], evaluate: Evaluate, holds: Holds, max_evaluations: int) -> SearchResult:
    """The layers to keep in higher precision so that `holds`, with at most `max_evaluations` calls of `evaluate`."""
    run = _Search(evaluate, holds, max_evaluations)
    order = tuple(dict.fromkeys(layers))
    nothing = run.try_set(frozenset())
    if nothing is not None and not nothing.holds:
        everything = run.try_set(frozenset(order))
        if everything is not None and everything.holds:
            ranked = _rank(run, _groups(order, max_evaluations), nothing.evaluation)
            _propose(run, ranked, nothing.evaluation, everything)
            _give_back(run, ranked)
    return run.result()


class _Search:
    """Evaluations by set, counted: a set is evaluated once, and none beyond the budget."""

    def __init__(self, evaluate: Evaluate, holds: Holds, max_evaluations: int) -> None:
        self.holds = holds
        self._evaluate, self._left = evaluate, max_evaluations
        self._tried: dict[Layers, Tried] = {}

    def try_set(self, kept: Layers) -> Tried | None:
        """The verdict on `kept`, or None when the budget is spent."""
        if kept not in self._tried:
            if self._left <= 0:
                return None
            self._left -= 1
            evaluation = self._evaluate(kept)
            self._tried[kept] = Tried(kept, evaluation, self.holds(evaluation))
        return self._tried[kept]

    def result(self) -> SearchResult:
        """The smallest set that holds; among equally large ones that with the least loss."""
        tried = tuple(self._tried.values())
        best = self.best()
        return SearchResult(best.kept if best else None, tried, pareto(tried))

    def best(self) -> Tried | None:
        """The smallest set so far that holds."""
        good = [one for one in self._tried.values() if one.holds]
        return min(good, key=lambda one: (one.evaluation.size_bytes, one.evaluation.loss), default=None)

    def has_failed(self, kept: Layers) -> bool:
        """Whether `kept`, or a set that contains it, was tried and does not hold."""
        return any(not one.holds and kept <= one.kept for one in self._tried.values())


def _groups(layers: Sequence[str], max_evaluations: int) -> list[tuple[str, ...]]:
    """Runs of neighbours: each layer alone if half the budget has room for that, else about sqrt(layers) of them."""
    count = len(layers)
    if count > max_evaluations - 6:
        count = max(1, min(count, math.isqrt(len(layers)) + 2, max_evaluations // 2))
    edges = [round(index * len(layers) / count) for index in range(count + 1)]
    return [tuple(layers[a:b]) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class _Group:
    """Neighbouring layers: the loss when they alone are kept, and what that costs in bytes."""

    layers: Layers
    loss: float
    cost_bytes: int


@dataclass(frozen=True)
class _Model:
    """Predicts losses: their `power`-th powers add up over groups, and `believed` of each gain is counted on."""

    nothing: Evaluation
    power: float
    believed: float = 1.0

    def gain(self, groups: Iterable[_Group]) -> float:
        """What keeping `groups` takes off the loss to the power, all believed."""
        return sum(_capped(self.nothing.loss) ** self.power - _capped(group.loss) ** self.power for group in groups)

    def predict(self, gain: float, cost_bytes: int) -> Evaluation:
        """The evaluation of a set with this gain and cost."""
        rest = max(0.0, _capped(self.nothing.loss) ** self.power - self.believed * gain)
        return Evaluation(self.nothing.size_bytes + cost_bytes, rest ** (1 / self.power))

    def corrected(self, gain: float, loss: float) -> _Model:
        """The model after a set of this gain, which was predicted to hold, gave `loss` and did not."""
        really = (_capped(self.nothing.loss) ** self.power - _capped(loss) ** self.power) / max(gain, 1e-30)
        return replace(self, believed=min(0.99 * self.believed, max(0.0, (self.believed + really) / 2)))


def _capped(loss: float) -> float:
    return min(loss, 1e6)


def _fit(groups: Sequence[_Group], nothing: Evaluation, everything: Evaluation) -> _Model:
    """The model whose power makes the single gains sum up to the gain of keeping everything, by halving."""

    def excess(power: float) -> float:
        model = _Model(nothing, power)
        return model.gain(groups) - (_capped(nothing.loss) ** power - _capped(everything.loss) ** power)

    low, high = 0.25, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return _Model(nothing, (low + high) / 2)


def _rank(run: _Search, groups: Iterable[tuple[str, ...]], nothing: Evaluation) -> list[_Group]:
    """Groups by what keeping them alone regains per byte, best first; one that could not be tried comes last."""
    found = []
    for group in groups:
        tried = run.try_set(frozenset(group))
        evaluation = nothing if tried is None else tried.evaluation
        cost = nothing.size_bytes if tried is None else evaluation.size_bytes - nothing.size_bytes
        found.append(_Group(frozenset(group), min(evaluation.loss, nothing.loss), max(1, cost)))
    return sorted(found, key=lambda one: (_capped(nothing.loss) - _capped(one.loss)) / one.cost_bytes, reverse=True)


def _propose(run: _Search, ranked: Sequence[_Group], nothing: Evaluation, everything: Tried) -> None:
    """Try the smallest set that is predicted to hold, correct the prediction by what it really gave, and again.

    Ends when no smaller set than the best found is predicted to hold, or when the budget is spent.
    """
    model = _fit(ranked, nothing, everything.evaluation)
    sets = [(model.gain(groups), sum(g.cost_bytes for g in groups), _joined(groups)) for groups in _sets(ranked)]
    sets.sort(key=lambda one: (one[1], -one[0]))
    while True:
        best = run.best() or everything
        chosen = next((one for one in sets if _is_promising(run, one[2], model.predict(one[0], one[1]), best)), None)
        tried = run.try_set(chosen[2]) if chosen else None
        if chosen is None or tried is None:
            return
        if not tried.holds:
            model = model.corrected(chosen[0], tried.evaluation.loss)


def _is_promising(run: _Search, layers: Layers, predicted: Evaluation, best: Tried) -> bool:
    is_smaller = predicted.size_bytes < best.evaluation.size_bytes
    return is_smaller and run.holds(predicted) and not run.has_failed(layers)


def _sets(ranked: Sequence[_Group]) -> list[tuple[_Group, ...]]:
    """All sets of groups, or the prefixes of the ranking where there are too many."""
    if len(ranked) > MAX_ENUMERATED_GROUPS:
        return [tuple(ranked[:count]) for count in range(1, len(ranked))]
    sizes = range(1, len(ranked))
    return [chosen for size in sizes for chosen in itertools.combinations(ranked, size)]


def _give_back(run: _Search, ranked: Sequence[_Group]) -> None:
    """Drop from the best set what is not needed, least useful first: groups, then halves of those that must stay."""
    best = run.best()
    if best is None:
        return
    kept = best.kept
    pieces = [tuple(sorted(group.layers)) for group in reversed(ranked) if group.layers <= kept]
    while pieces:
        piece = pieces.pop(0)
        smaller = kept - frozenset(piece)
        tried = None if not smaller or run.has_failed(smaller) else run.try_set(smaller)
        if tried is not None and tried.holds:
            kept = tried.kept
        elif len(piece) > 1:
            middle = len(piece) // 2
            pieces += [piece[middle:], piece[:middle]]


def _joined(groups: Iterable[_Group]) -> Layers:
    return frozenset(layer for group in groups for layer in group.layers)


def pareto(tried: Sequence[Tried]) -> tuple[Tried, ...]:
    """Those that no other dominates, smallest first."""
    front = [one for one in tried if not any(other.evaluation.dominates(one.evaluation) for other in tried)]
    return tuple(sorted(front, key=lambda one: (one.evaluation.size_bytes, one.evaluation.loss)))
