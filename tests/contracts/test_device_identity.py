"""A device's certificate through its whole life, on a real control plane, a real broker and a real agent."""

from __future__ import annotations

import json
import os
import random
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from paho.mqtt.enums import CallbackAPIVersion

from cloud.control.authority import Authority
from cloud.control.broker import client_context
from edge_agent.credentials import FileKeys
from tests.fakes.agent_plane import AgentProcess
from tests.fakes.control import ControlProcess, FakeDevice, wait_until
from wire import topics

SHORT_H = 32 / 3600  # dated 32 s back for slow clocks, valid for 32 s: due 10.7 s after it was made
NUM_RENEWALS = 20 if os.environ.get("FORESHORE_FAULTS") == "all" else 1


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path_factory.mktemp("identity"))
    process.start()
    await_epoch(FakeDevice(process, "first"))
    yield process
    assert process.stop() == 0


@pytest.fixture
def make(control: ControlProcess) -> Iterator[Callable[[str], FakeDevice]]:
    made: list[FakeDevice] = []

    def make(name: str) -> FakeDevice:
        made.append(FakeDevice(control, name))
        return made[-1]

    yield make
    for device in made:
        device.close()


def test_the_devices_port_wants_a_certificate_of_our_authority(
    control: ControlProcess, make: Callable[[str], FakeDevice], tmp_path: Path
) -> None:
    device = make("shown")
    assert device.call("GET", "/device/desired").status_code == 404  # known, and nothing is desired yet
    anyone = ssl.create_default_context(cadata=device.identity["ca_pem"])
    url = f"{control.device_url}/api/v1/device/desired"
    assert httpx.get(url, verify=anyone).status_code == 401
    assert httpx.get(url, verify=anyone, headers={"authorization": f"Bearer {control.token()}"}).status_code == 401
    foreign = Authority(tmp_path / "foreign")
    context = client_context(control.home / "pki" / "ca.pem", *foreign.ensure_client("default.shown"))
    with pytest.raises(httpx.HTTPError):
        httpx.get(url, verify=context)
    ours = Authority(control.home / "pki").ensure_client("control")  # ours, but no device's
    assert httpx.get(url, verify=client_context(control.home / "pki" / "ca.pem", *ours)).status_code == 401


def test_a_revoked_device_is_cut_off_everywhere_and_stays_out(
    control: ControlProcess, make: Callable[[str], FakeDevice]
) -> None:
    device = make("cut")
    device.connect()
    cut: list[str] = []
    device.client.on_disconnect = lambda _c, _u, _f, reason, _p: cut.append(str(reason))
    with httpx.Client(base_url=f"{control.device_url}/api/v1", verify=device.tls) as kept_alive:
        assert kept_alive.get("/device/desired").status_code == 404
        control.ok("DELETE", "/devices/cut")
        assert kept_alive.get("/device/desired").status_code == 401
    wait_until(lambda: cut, "the live MQTT connection is cut", 60)
    device.client.loop_stop()
    assert not can_connect(device.identity["mqtt"], device.tls, device.identity["mqtt"]["client_id"])
    assert not can_connect(device.identity["mqtt"], device.tls, "another-client-id")
    other = make("uncut")
    other.connect()  # revoking one does not lock out the others


def test_several_revocations_within_one_second_all_hold(
    control: ControlProcess, make: Callable[[str], FakeDevice]
) -> None:
    devices = [make(f"many-{number}") for number in range(4)]
    assert all(can_connect(one.identity["mqtt"], one.tls, one.identity["mqtt"]["client_id"]) for one in devices)
    for device in devices:
        control.ok("DELETE", f"/devices/{device.device_id}")
    assert not any(can_connect(one.identity["mqtt"], one.tls, "any") for one in devices)


def test_nobody_takes_over_the_connection_of_another_device(make: Callable[[str], FakeDevice]) -> None:
    victim, thief = make("victim"), make("thief")
    victim.connect()
    cut: list[str] = []
    victim.client.on_disconnect = lambda *_: cut.append("cut")
    for client_id in ("default.victim", "default.victim.bulk", "victim", "foreshore-control.bulk"):
        can_connect(thief.identity["mqtt"], thief.tls, client_id)
    time.sleep(0.5)
    assert not cut
    assert victim.identity["mqtt"]["client_id"] != thief.identity["mqtt"]["client_id"]


def test_the_old_certificate_lives_until_the_new_one_is_shown(
    control: ControlProcess, make: Callable[[str], FakeDevice], tmp_path: Path
) -> None:
    device = make("renewed")
    keys = FileKeys()
    key = keys.create()
    answer = device.call("POST", "/device/certificate", {"csr_pem": keys.request(key)})
    assert answer.status_code == 201
    file = tmp_path / "next.pem"
    file.write_text(key + answer.json()["certificate_pem"])
    context = ssl.create_default_context(cadata=device.identity["ca_pem"])
    context.load_cert_chain(file)
    mqtt_at, old, client_id = device.identity["mqtt"], device.tls, device.identity["mqtt"]["client_id"]
    assert device.call("GET", "/device/desired").status_code == 404
    assert can_connect(mqtt_at, old, client_id)
    assert can_connect(mqtt_at, context, client_id)
    device.tls = context
    assert device.call("POST", "/device/certificate/confirm", {}).status_code == 204
    assert device.call("GET", "/device/desired").status_code == 404
    assert can_connect(mqtt_at, context, client_id)
    assert not can_connect(mqtt_at, old, client_id)
    device.tls = old
    assert device.call("GET", "/device/desired").status_code == 401
    assert device.call("POST", "/device/certificate", {"csr_pem": keys.request(key)}).status_code == 401
    device.tls = context
    assert device.call("POST", "/device/certificate/confirm", {}).status_code == 204  # again changes nothing


def test_an_agent_enrols_only_with_the_control_plane_that_made_the_token(
    control: ControlProcess, tmp_path: Path
) -> None:
    token = control.ok("POST", "/enrolments", {"device_id": "careful"})["enrolment_token"]
    secret, _, pin = token.partition(".")
    wrong = enrol(control.device_url, f"{secret}.{pin[:-2]}AA", tmp_path / "a")
    assert wrong.returncode == 4
    assert "is not the control plane that made this token" in wrong.stderr
    unpinned = enrol(control.device_url, secret, tmp_path / "b")
    assert unpinned.returncode == 3  # nobody the system trusts vouches for it
    in_the_open = enrol("http://192.0.2.1:8080", token, tmp_path / "c")
    assert in_the_open.returncode == 2
    assert "in the open" in in_the_open.stderr
    good = enrol(control.device_url, token, tmp_path / "d")
    assert good.returncode == 0, good.stderr
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "d").iterdir() if file.is_file()}
    assert set(modes.values()) == {0o600}
    assert enrol(control.device_url, token, tmp_path / "e").returncode == 4  # spent


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_short_lived_certificates_are_renewed_in_time_whatever_kills_the_agent(tmp_path: Path) -> None:
    control = ControlProcess(tmp_path / "control")
    control.options = ["--device-certificate-hours", str(SHORT_H)]
    control.start()
    agent, chance = AgentProcess(tmp_path / "home"), random.Random(7)
    try:
        token = control.ok("POST", "/enrolments", {"device_id": "young"})["enrolment_token"]
        assert enrol(control.device_url, token, agent.home).returncode == 0
        serials = [serial_of(agent.home)]
        while len(serials) < NUM_RENEWALS + 1:
            agent.start()
            began = time.monotonic()
            until = began + chance.uniform(6.0, 14.0)  # around the renewal, often in the middle of it
            while time.monotonic() < until and serial_of(agent.home) == serials[-1]:
                time.sleep(0.002)
            time.sleep(chance.choice([0.0, 0.001, 0.005, 0.02]))
            agent.kill()
            if serial_of(agent.home) != serials[-1]:
                serials.append(serial_of(agent.home))
            else:
                assert identity_works(control, agent.home)
        agent.start()
        shown = wait_until(lambda: (d := control.ok("GET", "/devices/young"))["online"] and d, "the device is back")
        assert shown["enrolled_at"]
        path = "/devices/young"
        wait_until(lambda: control.ok("GET", path)["certificate_serial"] == serial_of(agent.home), "it is confirmed")
        assert agent.stop() == 0
        assert identity_works(control, agent.home)
    finally:
        agent.stop()
        control.stop()


def await_epoch(device: FakeDevice) -> None:
    """Wait until the control plane has given the new broker what it should hold: then no wish comes by itself."""
    device.connect()
    device.client.subscribe(topics.EPOCH, qos=1)
    wait_until(lambda: any(topic == topics.EPOCH for topic, _ in device.received), "the broker's epoch is kept")
    device.close()


def can_connect(at: dict[str, Any], tls: ssl.SSLContext, client_id: str) -> bool:
    """Whether the broker lets this certificate in."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5)
    client.tls_set_context(tls)
    answers: list[bool] = []
    client.on_connect = lambda _c, _u, _f, reason, _p: answers.append(not reason.is_failure)
    try:
        client.connect(at["host"], at["port"], clean_start=True)
        deadline = time.monotonic() + 5
        while not answers and time.monotonic() < deadline and client.loop(0.05) == mqtt.MQTT_ERR_SUCCESS:
            pass
        client.disconnect()
    except OSError:
        return False
    return answers == [True]


def enrol(url: str, token: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Enrol as a person would, the token on standard input."""
    command = [sys.executable, "-m", "edge_agent.cli", "enrol", "--url", url, "--token-file", "-", "--home", str(home)]
    return subprocess.run(command, input=token, capture_output=True, text=True, timeout=60, check=False)


def serial_of(home: Path) -> str:
    """The serial number of the certificate in use."""
    return f"{x509.load_pem_x509_certificate((home / 'device.pem').read_bytes()).serial_number:x}"


def identity_works(control: ControlProcess, home: Path) -> bool:
    """Whether the control plane knows the key and certificate in the agent's home, at HTTPS and at the broker."""
    context = ssl.create_default_context(cafile=str(home / "ca.pem"))
    context.load_cert_chain(home / "device.pem")
    known = httpx.get(f"{control.device_url}/api/v1/device/desired", verify=context).status_code in (200, 404)
    at = json.loads((home / "identity.json").read_text())["mqtt"]
    return known and can_connect(at, context, "probe")
