"""The search for layers to keep: within its budget, near the exhaustive optimum, and honest where nothing holds."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.sensitivity import Evaluation, Layers, budget, pareto, search

BASE_BYTES = 1_000_000


class Network:
    """Layers with a size and a loss each; losses add up to the power `power`, and neighbours help each other a bit."""

    def __init__(self, seed: int, num_layers: int, power: float, limit_share: float) -> None:
        draw = random.Random(seed)
        self.layers = [f"layer{index}" for index in range(num_layers)]
        self.bytes = {name: draw.randint(5_000, 200_000) for name in self.layers}
        self.loss = {name: draw.expovariate(1.0) for name in self.layers}
        self.power = power
        self.limit = limit_share * self.evaluate(frozenset()).loss
        self.num_evaluations = 0

    def evaluate(self, kept: Layers) -> Evaluation:
        self.num_evaluations = getattr(self, "num_evaluations", 0) + 1
        loss = sum(self.loss[name] ** self.power for name in self.layers if name not in kept) ** (1 / self.power)
        pairs = sum({a, b} <= kept for a, b in itertools.pairwise(self.layers))
        return Evaluation(BASE_BYTES + sum(self.bytes[name] for name in kept), loss * (1 - 0.002 * pairs))

    def holds(self, evaluation: Evaluation) -> bool:
        return evaluation.loss <= self.limit

    def optimum(self) -> int:
        sets = itertools.chain.from_iterable(
            itertools.combinations(self.layers, size) for size in range(len(self.layers) + 1)
        )
        tried = [self.evaluate(frozenset(kept)) for kept in sets]
        return min(one.size_bytes for one in tried if self.holds(one))


def test_on_ten_layers_98_of_100_results_are_within_five_per_cent_of_the_exhaustive_optimum() -> None:
    draw = random.Random(3)
    ratios = []
    for _ in range(100):
        network = Network(draw.randrange(10_000), 10, draw.choice([1.0, 1.3]), draw.uniform(0.05, 0.95))
        found = search(network.layers, network.evaluate, network.holds, budget(10))
        assert found.kept is not None
        assert network.holds(network.evaluate(found.kept))
        ratios.append(network.evaluate(found.kept).size_bytes / network.optimum())
    assert sorted(ratios)[97] <= 1.05
    assert max(ratios) <= 1.15, "a search on a budget misses some pairs"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.floats(0.0, 1.2))
def test_a_search_never_costs_more_than_its_budget_and_what_it_returns_holds(
    seed: int, num_layers: int, limit_share: float
) -> None:
    network = Network(seed, num_layers, 1.0, limit_share)
    network.num_evaluations = 0
    found = search(network.layers, network.evaluate, network.holds, budget(num_layers))
    assert network.num_evaluations <= budget(num_layers)
    assert len({tried.kept for tried in found.evaluations}) == len(found.evaluations)
    assert found.kept is not None
    assert network.holds(network.evaluate(found.kept))
    if limit_share >= 1:
        assert found.kept == frozenset()


def test_a_network_of_which_a_few_layers_do_the_harm_keeps_few() -> None:
    network = Network(5, 52, 1.0, 0.5)
    network.loss |= dict.fromkeys(network.layers, 0.01) | {"layer3": 4.0, "layer4": 3.0, "layer40": 2.0}
    network.limit = 1.0
    found = search(network.layers, network.evaluate, network.holds, budget(52))
    assert found.kept is not None
    assert {"layer3", "layer4", "layer40"} <= found.kept
    assert len(found.kept) <= 13


def test_where_even_keeping_all_does_not_hold_the_search_stops_at_once() -> None:
    network = Network(1, 20, 1.0, 0.5)
    found = search(network.layers, network.evaluate, lambda evaluation: False, budget(20))
    assert found.kept is None
    assert len(found.evaluations) == 2


def test_the_front_holds_exactly_what_nothing_else_dominates() -> None:
    network = Network(2, 8, 1.0, 0.3)
    tried = search(network.layers, network.evaluate, network.holds, budget(8)).evaluations
    front = pareto(tried)
    for one in tried:
        is_dominated = any(other.evaluation.dominates(one.evaluation) for other in tried)
        assert (one in front) is not is_dominated
    losses = [one.evaluation.loss for one in front]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(("num_layers", "allowed"), [(0, 10), (10, 19), (52, 31), (151, 46)])
def test_the_budget_is_three_roots_and_ten(num_layers: int, allowed: int) -> None:
    assert budget(num_layers) == allowed == int(3 * math.sqrt(num_layers)) + 10
