"""Progress of a job: shares that never fall, and a time left that is learned from past stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.progress import Progress, StageTimes


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _run(times: StageTimes, stages: dict[str, float], size_bytes: int) -> list[tuple[str, float, float]]:
    """(stage, share, seconds left as it began) of each stage of a job whose stages take the given seconds."""
    clock, said = _Clock(), []
    progress = Progress(list(stages), times, size_bytes, lambda stage, share, message: said.append(share), clock)
    seen = []
    for stage, seconds in stages.items():
        left = progress.remaining_s()
        with progress.running(stage, "working"):
            seen.append((stage, said[-1], left))
            clock.now += seconds
    progress.finish("done")
    assert said == sorted(said)
    assert said[-1] == 1.0
    return seen


def test_the_time_left_is_what_the_stages_took_before(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    _run(StageTimes(path), {"clean": 4.0, "measure": 6.0}, 1000)
    seen = _run(StageTimes(path), {"clean": 4.0, "measure": 6.0}, 1000)
    assert [left for _, _, left in seen] == pytest.approx([10.0, 6.0])
    assert seen[1][1] == pytest.approx(0.4)


def test_a_larger_model_is_expected_to_take_longer(tmp_path: Path) -> None:
    times = StageTimes(tmp_path / "times.json")
    times.learn("clean", 1000, 10.0)
    assert 10.0 < times.expected_s("clean", 4000) < 40.0


def _fail_after(seconds: float, progress: Progress, clock: _Clock) -> None:
    with progress.running("clean", "working"):
        clock.now += seconds
        raise RuntimeError("no")


def test_a_stage_that_fails_teaches_nothing(tmp_path: Path) -> None:
    times, clock = StageTimes(tmp_path / "times.json"), _Clock()
    before = times.expected_s("clean", 1000)
    progress = Progress(["clean"], times, 1000, lambda *event: None, clock)
    with pytest.raises(RuntimeError):
        _fail_after(500, progress, clock)
    assert times.expected_s("clean", 1000) == before


def test_stages_that_were_there_are_not_waited_for(tmp_path: Path) -> None:
    times = StageTimes(tmp_path / "times.json")
    times.learn("clean", 1000, 10.0)
    times.learn("measure", 1000, 5.0)
    progress = Progress(["clean", "measure"], times, 1000, lambda *event: None)
    progress.skip("clean")
    assert progress.remaining_s() == pytest.approx(5.0)


def test_times_that_cannot_be_read_are_a_first_guess(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text("{broken")
    assert StageTimes(tmp_path / "times.json").expected_s("genai", 10**8) > 0
