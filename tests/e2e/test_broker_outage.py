"""The real control plane, the real broker, a real agent: the broker goes away in the middle of a download.

What is missing arrives over HTTP or, once the broker is back, over MQTT: the device's choice, and no matter here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from model_registry.encodings import whole_frames
from model_registry.manifest import Manifest, sha256
from tests.fakes.agent_plane import AgentProcess, tiny_model
from tests.fakes.control import CHUNK_BYTES, ControlProcess, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.alone]

PADDING_BYTES = 24 << 20
OUTAGE_S = 30.0
WINDOW_CHUNKS = 8  # the bulk connection's receive maximum: what may be in flight when the connection dies


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path / "control")
    process.start()
    yield process
    process.stop()


@pytest.fixture
def published(control: ControlProcess) -> dict[str, Any]:
    return control.publish("tiny", tiny_model(2.0, padding_bytes=PADDING_BYTES))


@pytest.fixture
def agent(control: ControlProcess, published: dict[str, Any], tmp_path: Path) -> Iterator[AgentProcess]:
    profile = tmp_path / "profile.yaml"
    profile.write_text("name: test\ntargets: [cpu-x86]\nmemory_budget_bytes: 2000000000\n")
    enrolment = control.ok("POST", "/enrolments", {"device_id": "dev-1"})
    agent = AgentProcess(tmp_path / "home")
    agent.enrol(f"https://127.0.0.1:{control.device_port}", str(profile), enrolment["enrolment_token"])
    agent.start()
    yield agent
    agent.stop()


def keep_broker_away(control: ControlProcess, seconds: float) -> None:
    """Kill every Mosquitto that the control plane starts, until the time is over."""
    assert control.process is not None
    parent, until = psutil.Process(control.process.pid), time.monotonic() + seconds
    while time.monotonic() < until:
        for child in parent.children(recursive=True):
            if "mosquitto" in child.name():
                child.kill()
        time.sleep(0.05)


def state_of(agent: AgentProcess) -> dict[str, Any]:
    models = httpx.get(f"{agent.url}/status", timeout=10).json()["models"]
    return dict(models[0]) if models else {}


def size_of_frames(manifest: Manifest, payload: bytes) -> int:
    pieces = [payload[at : at + CHUNK_BYTES] for at in range(0, len(payload), CHUNK_BYTES)]
    by_digest = {sha256(piece): piece for piece in pieces}
    return sum(map(len, whole_frames(manifest, by_digest.__getitem__)))


def test_half_a_minute_without_the_broker_costs_no_more_than_the_window(
    control: ControlProcess, published: dict[str, Any], agent: AgentProcess
) -> None:
    wait_until(lambda: control.ok("GET", "/devices/dev-1")["reported"], "the agent reports")
    control.ok("POST", "/rollouts", {"release": published["release"], "group": "all", "start": True})
    wait_until(lambda: state_of(agent).get("bytes_done", 0) > PADDING_BYTES // 8, "the download is under way")
    keep_broker_away(control, 0.5)
    cut = state_of(agent)
    assert cut["phase"] == "fetch"
    assert cut["bytes_done"] < cut["bytes_total"]
    keep_broker_away(control, OUTAGE_S)
    wait_until(lambda: state_of(agent).get("phase") == "committed", "the update is complete", 120)
    assert agent.scale() == 2.0
    assert state_of(agent)["encoding"] == "whole"
    payload = tiny_model(2.0, padding_bytes=PADDING_BYTES)  # no codec shortens it: frames are chunks and a header
    most = size_of_frames(published["manifest"], payload) + WINDOW_CHUNKS * (CHUNK_BYTES + 1024)
    assert len(payload) <= state_of(agent)["wire_bytes"] <= most
