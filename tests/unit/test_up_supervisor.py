"""The supervisor with real child processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud.up.child import MAX_DELAY_S, ChildSpec, restart_delay_s
from cloud.up.supervisor import Supervisor
from wire.errors import TimedOutError

SERVER = "import sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text('{}'); time.sleep(60)"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path / "state.json")
    yield supervisor
    supervisor.stop()


def server(tmp_path: Path, name: str = "server") -> ChildSpec:
    port_file = tmp_path / f"{name}.port"
    return ChildSpec(name, (sys.executable, "-c", SERVER, str(port_file)), tmp_path / f"{name}.log", port_file)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_is_ready_when_its_port_file_appears(supervisor: Supervisor, tmp_path: Path) -> None:
    child = supervisor.start_and_wait(server(tmp_path), timeout_s=30)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["children"]["server"]["pid"] == child.pid
    assert state["children"]["server"]["state"] == "running"


def test_a_killed_child_comes_back_with_another_pid(supervisor: Supervisor, tmp_path: Path) -> None:
    child = supervisor.start_and_wait(server(tmp_path), timeout_s=30)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    supervisor.run_until(lambda: child.num_restarts == 1 and child.is_ready, timeout_s=30, what="the restart")
    assert child.pid not in {None, first}
    assert child.last_exit == -signal.SIGKILL


def test_stopping_leaves_no_process_behind(supervisor: Supervisor, tmp_path: Path) -> None:
    pids = [supervisor.start_and_wait(server(tmp_path, name), timeout_s=30).pid for name in ("one", "two")]
    supervisor.stop()
    assert [pid for pid in pids if pid is not None and is_alive(pid)] == []


def test_a_child_that_ignores_the_request_to_end_is_killed(supervisor: Supervisor, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cloud.up.supervisor.STOP_TIMEOUT_S", 0.5)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SERVER
    port_file = tmp_path / "port"
    spec = ChildSpec("stubborn", (sys.executable, "-c", stubborn, str(port_file)), tmp_path / "log", port_file)
    child = supervisor.start_and_wait(spec, timeout_s=30)
    supervisor.stop()
    assert child.last_exit == -signal.SIGKILL


def test_a_child_that_never_gets_ready_is_an_error_that_names_its_log(supervisor: Supervisor, tmp_path: Path) -> None:
    spec = ChildSpec("broken", (sys.executable, "-c", "raise SystemExit(3)"), tmp_path / "broken.log", tmp_path / "p")
    with pytest.raises(TimedOutError, match=r"broken\.log"):
        supervisor.start_and_wait(spec, timeout_s=2)


def test_restart_delays_double_and_are_capped() -> None:
    delays = [restart_delay_s(deaths) for deaths in range(1, 12)]
    assert delays == sorted(delays)
    assert delays[1] == 2 * delays[0]
    assert delays[-1] == MAX_DELAY_S
