"""Threads by measurement: with a clock of the test's own, and machines made of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud.serving.cpu_threads import count_cores, find_quota, given, measure, own_cgroup, thread_counts, wanted


class Machine:
    """A clock that steps move forward: `times_s` by number of threads."""

    def __init__(self, prefill_s: dict[int, float], decode_s: dict[int, float]) -> None:
        self.now = 100.0
        self.calls: list[tuple[str, int]] = []
        self._times_s = {"prefill": prefill_s, "decode": decode_s}

    def clock(self) -> float:
        return self.now

    def prefill(self, num_threads: int) -> None:
        self._run("prefill", num_threads)

    def decode(self, num_threads: int) -> None:
        self._run("decode", num_threads)

    def _run(self, kind: str, num_threads: int) -> None:
        self.calls.append((kind, num_threads))
        self.now += self._times_s[kind][num_threads]


def test_prompts_and_decoding_each_get_their_fastest_number() -> None:
    machine = Machine({1: 0.08, 2: 0.05, 4: 0.03}, {1: 0.010, 2: 0.008, 4: 0.011})
    plan = measure(machine.prefill, machine.decode, 4, machine.clock)
    assert (plan.prefill, plan.decode) == (4, 2)
    assert plan.of([1, 1, 1]) == 2
    assert plan.of([1, 7]) == 4
    assert plan.decode_ms == pytest.approx({1: 10, 2: 8, 4: 11})
    assert plan.reason == (
        "prefill: 4 threads (1: 80.0 ms, 2: 50.0 ms, 4: 30.0 ms); decode: 2 threads (1: 10.0 ms, 2: 8.0 ms, 4: 11.0 ms)"
    )


def test_equal_times_take_fewer_threads() -> None:
    machine = Machine({1: 0.05, 2: 0.05}, {1: 0.01, 2: 0.01})
    plan = measure(machine.prefill, machine.decode, 2, machine.clock)
    assert (plan.prefill, plan.decode) == (1, 1)


def test_the_budget_holds_for_a_model_of_middle_size() -> None:
    machine = Machine({1: 0.9, 2: 0.6, 4: 0.5, 8: 0.4}, {1: 0.09, 2: 0.06, 4: 0.05, 8: 0.04})
    measure(machine.prefill, machine.decode, 8, machine.clock, budget_s=2.0)
    assert machine.now - 100.0 <= 2.0 + 0.9


def test_a_busy_machine_on_which_two_threads_stall_gets_one() -> None:
    machine = Machine({1: 0.3, 2: 6.0}, {1: 0.05, 2: 1.5})
    plan = measure(machine.prefill, machine.decode, 2, machine.clock)
    assert (plan.prefill, plan.decode) == (1, 1)
    assert ("prefill", 2) not in machine.calls


def test_a_model_too_slow_to_be_measured_keeps_all_cores() -> None:
    machine = Machine({1: 90.0, 2: 60.0, 4: 40.0}, {1: 9.0, 2: 6.0, 4: 4.0})
    plan = measure(machine.prefill, machine.decode, 4, machine.clock)
    assert (plan.prefill, plan.decode) == (4, 4)
    assert machine.calls == [("decode", 1)]
    assert plan.reason == "prefill: 4 threads (too slow to measure); decode: 4 threads (1: 9000.0 ms)"


def test_what_was_given_is_not_measured() -> None:
    plan = given(3)
    assert (plan.prefill, plan.decode) == (3, 3)
    assert plan.reason == "prefill: 3 threads (given); decode: 3 threads (given)"


def test_the_option_goes_before_the_environment() -> None:
    assert wanted(3, {"OMP_NUM_THREADS": "2"}) == 3
    assert wanted(0, {"OMP_NUM_THREADS": "2,1"}) == 2
    assert [wanted(0, {"OMP_NUM_THREADS": value}) for value in ("", "many", "-1")] == [0, 0, 0]
    assert wanted(0, {}) == 0


def test_counts_are_powers_of_two_and_all_cores() -> None:
    assert [thread_counts(number) for number in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def siblings(folder: Path, groups: list[str]) -> Path:
    """A topology in which each CPU names the CPUs of its core."""
    for cpu, group in enumerate(groups):
        (folder / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(group + "\n")
    return folder


def test_two_threads_of_a_core_are_one_core(tmp_path: Path) -> None:
    topology = siblings(tmp_path / "cpus", ["0,2", "1,3", "0,2", "1,3"])
    assert count_cores(range(4), topology, tmp_path) == 2
    assert count_cores({1, 3}, topology, tmp_path) == 1
    assert count_cores(range(6), tmp_path / "absent", tmp_path) == 6


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "400000 100000", "../cpu.max": "100000 100000"}, 1.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu.max": "nonsense"}, None),
    ],
)
def test_a_quota_is_read_in_both_versions(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    group = tmp_path / "outer" / "inner"
    group.mkdir(parents=True)
    for name, text in files.items():
        path = group / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    assert find_quota(group) == quota
    cores = count_cores(range(8), tmp_path / "absent", group)
    assert cores == (8 if quota is None else max(1, -(-int(quota * 10) // 10)))


def test_the_own_group_is_that_of_version_two(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("12:cpu:/old\n0::/system.slice/worker\n")
    assert own_cgroup(tmp_path / "cgroup") == Path("/sys/fs/cgroup/system.slice/worker")
    assert own_cgroup(tmp_path / "absent") == Path("/sys/fs/cgroup")
