"""Control plane, gateway and agent install and run without torch: each in an environment that has only its extra.

The agent's memory without a model is measured there too: what other extras bring does not count.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fakes.control import wait_until

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
IDLE_BYTES = 80 << 20
HEAVY = ("torch", "transformers", "triton", "onnx")
pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.models, pytest.mark.timeout(900)]

PROBE = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(name) for name in sys.argv[1:]))"


def install(folder: Path, extra: str) -> Path:
    """A new environment with `foreshore[extra]` alone; its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    command = [
        folder / "bin" / "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
        "-c",
        "constraints.txt",
    ]
    done = subprocess.run([*command, f".[{extra}]"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "bin"


def run(bin_folder: Path, *command: str, cwd: Path) -> str:
    done = subprocess.run(
        [bin_folder / command[0], *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Running:
    """A process of one environment that writes a port file."""

    def __init__(self, bin_folder: Path, home: Path, *command: str) -> None:
        self.port_file, self.log = home / f"{command[1]}.port", home / f"{command[1]}.log"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [bin_folder / command[0], *command[1:], "--port-file", str(self.port_file)],
                cwd=home, stdout=log, stderr=log, env=environment,
            )  # fmt: skip
        wait_until(self.port_file.exists, f"{command} starts: see {self.log}", 60)
        self.port = int(httpx.Response(200, content=self.port_file.read_bytes()).json()["port"])

    def healthz(self) -> int:
        return httpx.get(f"http://127.0.0.1:{self.port}/healthz", timeout=10).status_code

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


def test_each_process_runs_in_an_environment_that_has_only_its_extra(tmp_path: Path) -> None:
    bins = {extra: install(tmp_path / extra, extra) for extra in ("control", "edge", "gateway")}
    for bin_folder in bins.values():
        run(bin_folder, "python", "-c", PROBE, *HEAVY, cwd=tmp_path)

    control = Running(bins["control"], tmp_path, "foreshore", "cloud", "--home", str(tmp_path / "home"))
    url, admin = f"http://127.0.0.1:{control.port}", tmp_path / "home" / "tokens" / "admin"
    assert control.healthz() == 200
    run(bins["control"], "foreshore", "devices", "--url", url, "--token-file", str(admin), cwd=tmp_path)

    headers = {"authorization": f"Bearer {admin.read_text()}"}
    keys = ["--folder", str(tmp_path / "keys"), "--url", url, "--token-file", str(admin)]
    run(bins["control"], "foreshore", "keys", "init", *keys, cwd=tmp_path)
    enrolment = httpx.post(f"{url}/api/v1/enrolments", json={"device_id": "d1"}, headers=headers).json()
    home = ["--home", str(tmp_path / "agent")]
    run(bins["edge"], *shlex.split(enrolment["command"]), *home, "--profile", "cpu-small", cwd=tmp_path)
    agent = Running(bins["edge"], tmp_path, "foreshore-agent", "run", *home)
    assert agent.healthz() == 200
    wait_until(lambda: httpx.get(f"{url}/api/v1/devices/d1", headers=headers).json()["online"], "the agent is online")
    time.sleep(2)
    assert psutil.Process(agent.process.pid).memory_info().rss <= IDLE_BYTES

    tokens = tmp_path / "tokens.txt"
    tokens.write_text("a-token-for-this-test\n")
    worker = ["--worker", "w=both@127.0.0.1:9", "--model-name", "m", "--tokenizer", str(TOKENIZER)]
    gateway = Running(bins["gateway"], tmp_path, "foreshore", "gateway", *worker, "--token-file", str(tokens))
    answer = httpx.get(f"http://127.0.0.1:{gateway.port}/v1/models", headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401

    assert [running.stop() for running in (gateway, agent, control)] == [0, 0, 0]
