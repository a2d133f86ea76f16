"""The main job with the real models, while each of its processes is killed once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.beside, pytest.mark.faults, pytest.mark.models, pytest.mark.slow, pytest.mark.timeout(1500)]

# step of the story -> who dies while it runs, and how many seconds after its beginning
KILLS = {
    "publish vision": [("compile-1", 8.0)],
    "publish language": [("control", 5.0), ("mosquitto", 10.0)],
    "roll out vision": [("cpu-1", 1.0)],
    "roll out language": [("orin-1", 6.0)],
    "answer on the device": [("cpu-2", 0.0)],
    "offload what does not fit": [("gateway", 0.5), ("decode-1", 6.0)],
    "reuse a shared prefix": [("prefill-1", 0.3)],
    "refuse a bad update": [("control", 3.0)],
    "send a good update as a delta": [("up", 4.0)],
}


def find_process(home: Path, demo: subprocess.Popen[bytes], name: str) -> psutil.Process | None:
    """The running process of that name, or None while it is being restarted."""
    if name == "up":
        return next((p for p in psutil.Process(demo.pid).children() if "cloud.cli" in p.cmdline()), None)
    try:
        children = json.loads((home / "state.json").read_text())["children"]
        pid = children["control" if name == "mosquitto" else name]["pid"]
        if name != "mosquitto":
            return psutil.Process(pid)
        return next(p for p in psutil.Process(pid).children(recursive=True) if "mosquitto" in p.name())
    except (OSError, ValueError, KeyError, TypeError, StopIteration, psutil.NoSuchProcess):
        return None


def kill(home: Path, demo: subprocess.Popen[bytes], name: str) -> int:
    """Kill -9 the process as soon as it runs; its pid."""
    while demo.poll() is None:
        process = find_process(home, demo, name)
        if process is not None and process.is_running():
            process.kill()
            return process.pid
        time.sleep(0.05)
    raise AssertionError(f"the demo ended before {name} could be killed")


def steps_begun(log: Path) -> list[str]:
    return [line[4:].strip() for line in log.read_text().splitlines() if line.startswith("==> ")]


@pytest.fixture
def demo(tmp_path: Path):
    log = tmp_path / "demo.log"
    command = [sys.executable, "-m", "cloud.demo", "--exit", "--home", str(tmp_path / "home")]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--json", str(tmp_path / "summary.json")], stdout=file, stderr=subprocess.STDOUT
        )
    yield process
    process.kill()
    process.wait(timeout=30)


def test_the_main_job_holds_while_each_process_is_killed_in_turn(demo: subprocess.Popen[bytes], tmp_path: Path) -> None:
    home, log, killed, done = tmp_path / "home", tmp_path / "demo.log", [], set()
    while demo.poll() is None:
        for step in steps_begun(log)[-1:]:
            for name, delay_s in KILLS.get(step, []) if step not in done else []:
                time.sleep(delay_s)
                killed.append((name, kill(home, demo, name)))
            done.add(step)
        time.sleep(0.05)
    assert demo.returncode == 0, log.read_text()[-6000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"]
    assert all(step["ok"] for step in summary["steps"])
    assert {name for name, _ in killed} == {name for kills in KILLS.values() for name, _ in kills}
    assert [pid for _, pid in killed if psutil.pid_exists(pid)] == []
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]
    assert left == []
