"""The control plane as a process: real HTTP, real Mosquitto, simulated devices that speak MQTT."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_registry.encodings import decode_frame
from tests.fakes.control import ControlProcess, FakeDevice, wait_until
from wire import topics
from wire.frames import parse_frame
from wire.messages import Need


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path_factory.mktemp("control"))
    process.start()
    yield process
    assert process.stop() == 0


@pytest.fixture
def devices(control: ControlProcess) -> Iterator[Any]:
    made: list[FakeDevice] = []

    def make(name: str, behaviour: str = "ok") -> FakeDevice:
        device = FakeDevice(control, name, behaviour)
        made.append(device)
        device.connect()
        wait_until(lambda: control.ok("GET", f"/devices/{name}")["reported"], f"{name} reports")
        return device

    yield make
    for device in made:
        device.close()
        control.call("DELETE", f"/devices/{device.device_id}")


def roll_out(control: ControlProcess, release: str, **more: Any) -> str:
    order = {"release": release, "group": "all", "waves": [{"count": 1}], "start": True, **more}
    return str(control.ok("POST", "/rollouts", order)["rollout_id"])


def ended(control: ControlProcess, rollout_id: str) -> dict[str, Any]:
    def look() -> Any:
        found = control.ok("GET", f"/rollouts/{rollout_id}")
        return found if found["status"] in ("succeeded", "halted", "rolled_back") else None

    found: dict[str, Any] = wait_until(look, "the rollout ends")
    return found


def test_an_enrolment_token_works_once(control: ControlProcess, devices: Any) -> None:
    devices("dev-once")
    again = control.call("POST", "/enrol", {"enrolment_token": "fe_used", "csr_pem": "x"}, token=None)
    assert again.status_code == 401
    assert again.json()["remedy"]
    assert control.call("POST", "/enrolments", {"device_id": "dev-once"}).status_code == 409


def test_a_device_can_neither_read_nor_write_the_topics_of_another(control: ControlProcess, devices: Any) -> None:
    spy, victim = devices("dev-spy"), devices("dev-victim")
    spy.client.subscribe(victim.topic("#"), qos=1)
    spy.client.subscribe("fs/1/+/d/+/reported", qos=1)
    time.sleep(0.3)
    before = control.ok("GET", "/devices/dev-victim")["last_seen_at"]
    spy.client.publish(victim.topic("reported"), b'{"v":1}', qos=1)
    victim.report()
    wait_until(lambda: control.ok("GET", "/devices/dev-victim")["last_seen_at"] != before, "the victim's own report")
    assert not [topic for topic, _ in spy.received if "dev-victim" in topic]


def test_a_revoked_device_is_heard_no_more(control: ControlProcess, devices: Any) -> None:
    device = devices("dev-gone")
    control.ok("DELETE", "/devices/dev-gone")
    assert control.call("GET", "/device/desired", token=device.identity["device_token"]).status_code == 401
    assert device.call("GET", "/device/desired").status_code == 401
    assert control.call("GET", "/devices/dev-gone").status_code == 404
    assert "dev-gone" not in (control.home / "mosquitto" / "access").read_text()


def test_a_release_rolls_out_and_its_chunks_arrive_over_mqtt(control: ControlProcess, devices: Any) -> None:
    one, two = devices("dev-one"), devices("dev-two")
    payload = os.urandom(300_000)
    published = control.publish("vision", payload)
    found = ended(control, roll_out(control, published["release"]))
    assert found["status"] == "succeeded", found
    assert one.desired is not None
    manifest = published["manifest"]
    chunks = manifest.chunk_list()
    for device in (one, two):
        need = Need(manifest=manifest.digest, manifest_wanted=True, missing=[(0, len(chunks))])
        device.client.publish(device.topic("need"), need.to_bytes(), qos=1)
    shared = topics.chunks("default", manifest.digest, "whole")

    def frames(device: FakeDevice) -> list[bytes]:
        return [data for topic, data in device.received if topic == shared]

    wait_until(lambda: len(frames(one)) >= len(chunks) and len(frames(two)) >= len(chunks), "all chunks")
    assert len(frames(one)) == len(chunks)  # both asked, each chunk was sent once
    parsed = sorted((parse_frame(data) for data in frames(one)), key=lambda frame: frame.index)
    whole = b"".join(decode_frame(frame, lambda _: None, chunk=chunks[frame.index]) for frame in parsed)
    assert whole == payload
    page = next(data for topic, data in one.received if topic == topics.manifest_page("default", manifest.digest))
    assert parse_frame(page).body == manifest.to_bytes()
    chunk = one.call("GET", f"/chunks/{chunks[0].digest}")
    assert chunk.content == payload[: chunks[0].size_bytes]


def test_a_bad_canary_halts_the_rollout_and_nobody_else_is_asked(control: ControlProcess, devices: Any) -> None:
    fleet = [devices(f"dev-canary-{number}", "fail") for number in range(3)]
    good = control.publish("canary", os.urandom(1000), "good-1")
    assert ended(control, roll_out(control, good["release"]))["status"] == "succeeded"
    bad = control.publish("canary", os.urandom(1000), "bad-2")
    found = ended(control, roll_out(control, bad["release"]))
    assert found["status"] == "halted"
    assert "golden outputs differ" in found["reason"]
    assert found["counts"] == {"failed": 1, "skipped": 2}
    decision = control.ok("GET", f"/decisions/{found['decision_id']}")
    assert decision["chosen"] == "halt"
    for device in fleet:
        wait_until(
            lambda device=device: device.desired and [m.version for m in device.desired.models] == ["good-1"],
            "the wish goes back",
        )


def test_a_silent_device_times_out_and_counts_as_a_failure(control: ControlProcess, devices: Any) -> None:
    devices("dev-silent", "silent")
    published = control.publish("silent", os.urandom(1000))
    found = ended(control, roll_out(control, published["release"], device_timeout_s=1))
    assert found["status"] == "halted"
    assert found["counts"] == {"timed_out": 1}


def test_a_broken_blob_is_refused_and_not_stored(control: ControlProcess) -> None:
    import httpx

    headers = {"authorization": f"Bearer {control.token()}"}
    url = f"{control.url}/api/v1/blobs/{'ab' * 32}"
    assert httpx.put(url, content=b"something else", headers=headers).status_code == 422
    assert httpx.head(url, headers=headers).status_code == 404


def test_a_blob_is_served_in_ranges(control: ControlProcess) -> None:
    digest = control.put_blob(b"0123456789")
    import httpx

    headers = {"authorization": f"Bearer {control.token()}", "range": "bytes=2-4"}
    answer = httpx.get(f"{control.url}/api/v1/blobs/{digest}", headers=headers)
    assert (answer.status_code, answer.content) == (206, b"234")


def test_everything_is_published_again_when_the_broker_comes_back_empty(control: ControlProcess, devices: Any) -> None:
    device = devices("dev-broker")
    published = control.publish("broker", os.urandom(1000))
    assert ended(control, roll_out(control, published["release"]))["status"] == "succeeded"
    device.received.clear()
    (control.home / "mosquitto" / "mosquitto.db").unlink(missing_ok=True)
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_broker(p, control)]
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: any(topic == device.topic("desired") for topic, _ in device.received), "republication", 60)


def _is_broker(process: Path, control: ControlProcess) -> bool:
    try:
        return str(control.home / "mosquitto" / "mosquitto.conf") in (process / "cmdline").read_text()
    except OSError:
        return False
