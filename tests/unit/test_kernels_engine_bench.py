"""The arithmetic of the GPU engine's benchmark, on a clock of its own."""

from __future__ import annotations

import pytest

import tests.fakes.kernel_device  # noqa: F401  (the interpreter switch comes first)
from benchmarks.engine_cuda import tpot_ms


class FakeEngine:
    """Takes 5 ms per prompt and 2 ms per decode step, and 3 s more the first time it sees a shape."""

    def __init__(self, step_s=0.002, noise_s=()):
        self.step_s = step_s
        self.noise_s = list(noise_s)
        self.seen = set()

    def seconds(self, lengths):
        first = 0.0 if tuple(lengths) in self.seen else 3.0
        self.seen.add(tuple(lengths))
        noise = self.noise_s.pop(0) if self.noise_s else 0.0
        return first + noise + 0.005 * len(lengths) + self.step_s * (lengths[0][1] - 1)


@pytest.mark.parametrize("batch", [1, 8, 256])
def test_time_per_output_token_leaves_out_the_first_run_of_each_shape(batch):
    assert tpot_ms(FakeEngine().seconds, batch) == pytest.approx(2.0)


def test_time_per_output_token_takes_the_best_of_two_of_both_runs():
    engine = FakeEngine(noise_s=[0.0, 0.0, 0.5, 0.0, 0.0, 0.7])
    assert tpot_ms(engine.seconds, 8) == pytest.approx(2.0)


def test_a_time_per_output_token_that_cannot_be_is_raised_not_reported():
    with pytest.raises(ArithmeticError, match="batch 64"):
        tpot_ms(FakeEngine(step_s=0.0).seconds, 64)
