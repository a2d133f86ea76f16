"""A real agent process against a real Mosquitto, with a small publisher that plays the control plane."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.fakes.agent_plane import AgentProcess, Plane
from wire.window import Window

IDLE_S = 6.0  # httpx gives an idle connection up after 5


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    plane = Plane(tmp_path / "plane")
    yield plane
    plane.close()


@pytest.fixture
def agent(plane: Plane, tmp_path: Path) -> Iterator[AgentProcess]:
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        "name: test\ntargets: [cpu-x86]\nmemory_budget_bytes: 100000000\nreconnect_max_s: 0.5\nfetch_stall_s: 2\n"
        "healthy_after_s: 0.2\n"
    )
    agent = AgentProcess(tmp_path / "home")
    agent.enrol(plane.url, str(profile))
    agent.start()
    yield agent
    agent.stop()


def test_a_signed_wish_becomes_a_model_that_answers(plane: Plane, agent: AgentProcess) -> None:
    plane.wish(plane.publish(2.0, "1.0.0"))
    done = plane.await_model(lambda m: m["phase"] == "committed")
    assert done["result"] == "succeeded"
    assert agent.scale() == 2.0
    assert plane.http_chunks == 0
    with triton.InferenceServerClient(agent.url.removeprefix("http://")) as client:
        assert client.is_model_ready("tiny")
        x = np.float32([[1, 2, 3, 4]])
        tensor = triton.InferInput("x", [1, 4], "FP32")
        tensor.set_data_from_numpy(x, binary_data=True)
        answer = client.infer("tiny", [tensor], outputs=[triton.InferRequestedOutput("y", binary_data=True)])
        assert (answer.as_numpy("y") == 2 * x).all()
    answer = httpx.post(f"{agent.url}/v2/models/tiny/infer", json={"inputs": []})
    assert answer.status_code == 400
    assert "error" in answer.json()
    until = time.monotonic() + 10
    while not any(event["kind"] == "decision" for event in plane.events) and time.monotonic() < until:
        time.sleep(0.1)
    assert {"update", "decision"} <= {event["kind"] for event in plane.events}
    assert agent.stop() == 0


def test_a_bad_update_is_refused_and_the_old_model_keeps_answering(plane: Plane, agent: AgentProcess) -> None:
    good = plane.publish(2.0, "1.0.0")
    plane.wish(good)
    plane.await_model(lambda m: m["phase"] == "committed")
    plane.wish(plane.publish(3.0, "1.1.0", golden_scale=2.0))
    refused = plane.await_model(lambda m: m.get("result") == "failed_no_change")
    assert refused["reason"].startswith("inaccurate")
    assert refused["active_version"] == "1.0.0"
    assert agent.scale() == 2.0
    plane.wish(plane.publish(4.0, "1.2.0"))
    plane.await_model(lambda m: m.get("active_version") == "1.2.0" and m["phase"] == "committed")
    assert agent.scale() == 4.0
    plane.wish(good)  # a newer signed wish may go back
    plane.await_model(lambda m: m.get("active_version") == "1.0.0" and m["phase"] == "committed")
    assert agent.scale() == 2.0


def test_what_is_unsigned_or_does_not_fit_changes_nothing(plane: Plane, agent: AgentProcess) -> None:
    plane.wish(plane.publish(2.0, "1.0.0"))
    plane.await_model(lambda m: m["phase"] == "committed")
    plane.wish(plane.publish(3.0, "2.0.0"), key=Ed25519PrivateKey.generate())
    until = time.monotonic() + 10
    while not any("bad_signature" in (r.get("error") or "") for r in plane.reported) and time.monotonic() < until:
        time.sleep(0.1)
    assert any("bad_signature" in (r.get("error") or "") for r in plane.reported)
    plane.wish(plane.publish(5.0, "3.0.0", memory=10**9))
    refused = plane.await_model(lambda m: m.get("result") == "failed_no_change")
    assert refused["reason"].startswith("insufficient_space")
    assert agent.scale() == 2.0


def test_it_downloads_early_and_switches_only_in_the_window(plane: Plane, agent: AgentProcess) -> None:
    plane.wish(plane.publish(2.0, "1.0.0"))
    plane.await_model(lambda m: m["phase"] == "committed")
    new = plane.publish(3.0, "1.1.0")
    later = Window(opens_s=(int(time.time()) + 7200) % 86_400, lasts_s=60)
    plane.wish(new.model_copy(update={"window": later}))
    waiting = plane.await_model(lambda m: m["phase"] == "wait_window")
    assert waiting["bytes_done"] == waiting["bytes_total"]
    assert agent.scale() == 2.0
    soon = Window(opens_s=(int(time.time()) + 2) % 86_400, lasts_s=3600)
    plane.wish(new.model_copy(update={"window": soon, "attempt": 1}))
    plane.await_model(lambda m: m.get("active_version") == "1.1.0" and m["phase"] == "committed")
    assert agent.scale() == 3.0


def test_a_silent_publisher_makes_the_agent_fetch_over_http(plane: Plane, agent: AgentProcess) -> None:
    plane.is_silent = True
    plane.wish(plane.publish(2.0, "1.0.0"))
    plane.await_model(lambda m: m["phase"] == "committed")
    assert plane.http_chunks == 2


def test_killed_in_the_middle_of_a_download_it_fetches_only_the_rest(plane: Plane, agent: AgentProcess) -> None:
    plane.pause_s = 0.05
    plane.wish(plane.publish(2.0, "1.0.0", padding_bytes=4 << 20))
    plane.await_model(lambda m: m["phase"] == "fetch" and m.get("bytes_done", 0) > 1 << 20)
    agent.kill()
    agent.start()
    plane.await_model(lambda m: m["phase"] == "committed", 60)
    assert agent.scale() == 2.0
    num_chunks = len(plane.chunks)
    assert plane.http_chunks == 0
    assert num_chunks <= len(set(plane.sent_chunks)) + 1
    state = httpx.get(f"{agent.url}/status").json()["models"][0]
    assert state["wire_bytes"] < state["bytes_total"]


def test_without_the_broker_for_a_while_the_download_resumes(plane: Plane, agent: AgentProcess) -> None:
    plane.pause_s = 0.05
    plane.wish(plane.publish(2.0, "1.0.0", padding_bytes=4 << 20))
    plane.await_model(lambda m: m["phase"] == "fetch" and m.get("bytes_done", 0) > 1 << 20)
    assert plane.broker.pid is not None
    import os
    import signal

    os.kill(plane.broker.pid, signal.SIGKILL)
    plane.await_model(lambda m: m["phase"] == "committed", 60)
    assert agent.scale() == 2.0


def test_a_connection_outlasts_the_time_that_clients_keep_it_idle(agent: AgentProcess) -> None:
    with httpx.Client(base_url=agent.url, limits=httpx.Limits(keepalive_expiry=60)) as client:
        ports = []
        for _ in range(2):
            answer = client.get("/healthz")
            ports.append(answer.extensions["network_stream"].get_extra_info("client_addr")[1])
            time.sleep(IDLE_S)
    assert ports[0] == ports[1]
