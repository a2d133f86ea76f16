"""A soak holds against a new version what the old one did better, and nothing else."""

from __future__ import annotations

from edge_agent.conduct import MIN_TIMED, Conduct, complaint


def _conduct(num_good: int, num_bad: int = 0, time_ms: float = 10.0) -> Conduct:
    conduct = Conduct()
    for _ in range(num_good):
        conduct.answered(time_ms)
    for _ in range(num_bad):
        conduct.failed()
    return conduct


def test_errors_beyond_those_of_the_old_version_end_a_soak() -> None:
    assert "3 of 13 requests failed" in (complaint(_conduct(10, 3), None, 2.0) or "")
    assert complaint(_conduct(10, 1), None, 2.0) is None
    assert complaint(_conduct(10, 3), _conduct(10, 3), 2.0) is None  # the applications' inputs are to blame


def test_a_slower_version_is_found_out_by_its_answers() -> None:
    assert "answers take 30.0 ms" in (complaint(_conduct(MIN_TIMED, time_ms=30), _conduct(MIN_TIMED), 2.0) or "")
    assert complaint(_conduct(MIN_TIMED, time_ms=19), _conduct(MIN_TIMED), 2.0) is None
    assert complaint(_conduct(MIN_TIMED, time_ms=1.5), _conduct(MIN_TIMED, time_ms=0.1), 2.0) is None  # noise


def test_few_answers_prove_nothing_about_speed() -> None:
    assert complaint(_conduct(MIN_TIMED - 1, time_ms=90), _conduct(MIN_TIMED), 2.0) is None
    assert complaint(_conduct(MIN_TIMED, time_ms=90), None, 2.0) is None
