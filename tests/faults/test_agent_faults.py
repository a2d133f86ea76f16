"""The device under faults: a seeded sample here, everything with `scripts/test --faults` (FORESHORE_FAULTS=all)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes.agent_plane import AgentProcess, Plane
from tests.faults.small_disk import SmallDiskRun, mounted
from tests.faults.swap_load import SwapRun

pytestmark = [pytest.mark.faults, pytest.mark.long]
ALL = os.environ.get("FORESHORE_FAULTS") == "all"
HOURS_S = 6 * 3600
PROFILE = "name: test\ntargets: [cpu-x86]\nmemory_budget_bytes: 500000000\nreconnect_max_s: 0.2\nhealthy_after_s: 0.2\n"


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    plane = Plane(tmp_path / "plane")
    yield plane
    plane.close()


@pytest.fixture
def agent(plane: Plane, tmp_path: Path) -> Iterator[AgentProcess]:
    (tmp_path / "profile.yaml").write_text(PROFILE)
    agent = AgentProcess(tmp_path / "home")
    agent.enrol(plane.url, str(tmp_path / "profile.yaml"))
    agent.start()
    yield agent
    agent.stop()


@pytest.mark.timeout(HOURS_S if ALL else 300)
def test_switches_under_load_lose_no_request(tmp_path: Path) -> None:
    run = SwapRun(tmp_path)
    try:
        figures = run.run(200 if ALL else 5, 1.0)
    finally:
        run.close()
    assert figures.findings == []
    assert figures.failed == figures.wrong_version == 0
    assert figures.num_switches == (201 if ALL else 6)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mounted(folder))
        except (subprocess.CalledProcessError, FileNotFoundError, PermissionError):
            pytest.skip("mounting a small file system needs root")
        yield folder


@pytest.mark.timeout(HOURS_S if ALL else 300)
def test_a_small_disk_refuses_before_it_begins_and_keeps_both_slots(tmp_path: Path, disk: Path) -> None:
    run = SmallDiskRun(tmp_path, disk, seed=1)
    try:
        figures = run.run(1000 if ALL else 5)
    finally:
        run.close()
    assert figures.findings == []
    assert figures.enospc_in_mid_update == figures.lost_slots == 0
    assert 0 < figures.num_refused < figures.num_trials


def test_an_agent_on_a_full_disk_starts_serves_and_takes_up_work_when_there_is_room(tmp_path: Path, disk: Path) -> None:
    run = SmallDiskRun(tmp_path, disk, seed=1)
    try:
        run.leave_free(0)
        for _ in range(20):
            assert run.agent.scale() == 2.0
        run.agent.kill()
        run.agent.start()
        until = time.monotonic() + 30
        while _scale(run.agent) != 2.0 and time.monotonic() < until:
            time.sleep(0.1)
        assert _scale(run.agent) == 2.0
        run.plane.wish(run.plane.publish(3.0, "3.0.0"))
        told = _await_error(run.agent, "disk_failed", 30)
        assert "No space left" in told
        assert run.agent.scale() == 2.0
        run.leave_free(40 << 20)
        run.plane.await_model(lambda m: m.get("active_version") == "3.0.0", 60)
        assert run.agent.scale() == 3.0
    finally:
        run.close()


def test_telemetry_arrives_once_in_effect_whatever_is_killed(plane: Plane, agent: AgentProcess) -> None:
    plane.wish(plane.publish(2.0, "2.0.0"))
    plane.await_model(lambda m: m["phase"] == "committed")
    decisions = []
    for _ in range(6):
        for _ in range(5):
            answer = httpx.post(f"{agent.url}/v2/models/tiny/infer", json=_BODY, timeout=10)
            decisions.append(answer.headers["x-foreshore-decision"])
        agent.kill()
        agent.start()
        _await_scale(agent, 2.0)
    until = time.monotonic() + 60
    while not set(decisions) <= set(_decided(plane)) and time.monotonic() < until:
        time.sleep(0.2)
    arrived = _decided(plane)
    assert len(arrived) == len(set(arrived))
    assert set(decisions) <= set(arrived)


def test_a_committed_model_that_kills_the_process_gives_way_to_the_one_before(
    plane: Plane, agent: AgentProcess
) -> None:
    """Three deaths before it was healthy: the previous slot answers."""
    for scale in (2.0, 3.0):
        plane.wish(plane.publish(scale, f"{scale:g}.0.0"))
        plane.await_model(lambda m, wanted=f"{scale:g}.0.0": m.get("active_version") == wanted)
    profile = agent.home / "profile.yaml"
    profile.write_text(profile.read_text().replace("healthy_after_s: 0.2", "healthy_after_s: 60.0"))
    for _ in range(4):
        os.kill(agent.pid, signal.SIGKILL)
        agent.await_death()
        agent.start()  # and is killed before it counts as healthy
    _await_scale(agent, 2.0)


_BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 1.0, 1.0, 1.0]}]}


def _decided(plane: Plane) -> list[str]:
    """The decisions among what is stored."""
    events = _stored(plane).values()
    return [str(event["body"]["decision_id"]) for event in events if event["kind"] == "decision"]


def _stored(plane: Plane) -> dict[str, dict[str, object]]:
    """Events as a control plane keeps them: one per id."""
    return {event["event_id"]: event for event in list(plane.events)}


def _scale(agent: AgentProcess) -> float | None:
    try:
        return agent.scale()
    except httpx.HTTPError:
        return None


def _await_scale(agent: AgentProcess, scale: float, timeout_s: float = 30) -> None:
    until = time.monotonic() + timeout_s
    while _scale(agent) != scale:
        assert time.monotonic() < until, f"{_scale(agent)} instead of {scale}"
        time.sleep(0.1)


def _await_error(agent: AgentProcess, text: str, timeout_s: float) -> str:
    until = time.monotonic() + timeout_s
    while text not in (error := str(httpx.get(f"{agent.url}/status", timeout=10).json().get("error"))):
        assert time.monotonic() < until, error
        time.sleep(0.1)
    return error
