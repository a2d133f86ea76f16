"""Engines by hardware key through the real control plane: leases, deaths, damage, wrong keys, signatures, proofs."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest
from typer.testing import CliRunner

from cloud.cli import app
from compiler.graph_facts import graph_facts
from model_registry.manifest import Requirements, parse_engine_build, sha256
from tests.fakes.agent_plane import golden_bytes, tiny_model
from tests.fakes.control import ControlProcess, FakeDevice, wait_until
from tests.fakes.simulated_tensorrt import build
from wire.messages import Hardware

LEASE_S, LIMIT_S = 2, 4
ORIN = Hardware(
    profile="jetson", targets=["cpu-x86"], architecture="aarch64", compute_capability="8.7", jetpack="6.2",
    runtimes={"onnxruntime": "1.23.2", "tensorrt": "10.3.0"}, memory_budget_bytes=1 << 30, disk_free_bytes=1 << 30,
)  # fmt: skip
ORIN_KEY = "tensorrt-10.3.0.sm87.aarch64.jetpack-6.2"
OLDER_KEY = "tensorrt-8.6.2.sm87.aarch64.jetpack-6.0"
OLDER = ORIN.model_copy(update={"jetpack": "6.0", "runtimes": {"onnxruntime": "1.22.1", "tensorrt": "8.6.2"}})


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path_factory.mktemp("engines"))
    process.options = ["--engine-lease-s", str(LEASE_S), "--engine-limit-s", str(LIMIT_S)]
    process.start()
    yield process
    assert process.stop() == 0


class Bench:
    """Jetsons that run a release of a model of their own, and the build that this makes wanted."""

    def __init__(self, control: ControlProcess, name: str) -> None:
        self.control, self.name = control, name
        self.graph = tiny_model(2.0)
        facts = graph_facts(onnx.load_from_string(self.graph))
        self.release = control.publish(name, self.graph, "1.0.0", golden=golden_bytes(2.0), graph=facts)
        self.manifest = self.release["manifest"].digest
        self.devices: list[FakeDevice] = []

    def device(self, name: str, hardware: Hardware = ORIN) -> FakeDevice:
        """An enrolled device that runs the release."""
        device = FakeDevice(self.control, f"{self.name}-{name}")
        device.hardware = hardware
        self.devices.append(device)
        device.connect()
        wait_until(lambda: self.control.ok("GET", f"/devices/{device.device_id}")["reported"], "it reports")
        self.control.ok("POST", "/groups", {"name": device.device_id, "device_ids": [device.device_id]})
        order = {"release": self.release["release"], "group": device.device_id, "start": True}
        self.control.ok("POST", "/rollouts", order)
        wait_until(lambda: self.runs(device), f"{name} runs it")
        return device

    def runs(self, device: FakeDevice) -> bool:
        models = (self.control.ok("GET", f"/devices/{device.device_id}")["reported"] or {})["models"]
        return any(one.get("active_manifest") == self.manifest for one in models)

    def builds(self) -> list[dict[str, Any]]:
        rows = self.control.ok("GET", "/engine-builds?limit=500")["items"]
        return [row for row in rows if row["manifest"] == self.manifest]

    def await_build(self, *states: str, key: str = ORIN_KEY, timeout_s: float = 20) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [row for row in self.builds() if row["hardware_key"] == key and row["state"] in states]
            return bool(found)

        wait_until(look, f"an engine build is {states}", timeout_s)
        return found[0]

    def sign(self, tmp_path: Path) -> str:
        """As a person does, who looks first."""
        environment = {"FORESHORE_URL": self.control.url,
                       "FORESHORE_TOKEN_FILE": str(self.control.home / "tokens" / "admin")}  # fmt: skip
        folder = self.control.home / "offline"
        words = ["engines", "sign", "--yes", "--folder", str(folder), "--json"]
        listed = CliRunner().invoke(app, ["engines"], env=environment)
        assert f"{self.name}  {ORIN_KEY}" in listed.output or "tensorrt-rtx" in listed.output, listed.output
        result = CliRunner().invoke(app, words, env=environment)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output


@pytest.fixture
def bench(control: ControlProcess, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(control, "m" + sha256(request.node.name.encode())[:8])
    yield bench
    for device in bench.devices:
        device.close()
        control.call("DELETE", f"/devices/{device.device_id}")


def lease(device: FakeDevice) -> dict[str, Any] | None:
    answer = device.call("POST", "/engine-builds/lease", {"keys": ["tensorrt-10.3.0.sm87.aarch64.jetpack-6.2"]})
    assert answer.is_success, answer.text
    return answer.json() if answer.content else None


def upload(device: FakeDevice, held: dict[str, Any], data: bytes, digest: str | None = None) -> httpx.Response:
    path = f"/engine-builds/{held['build_id']}/engine/{digest or sha256(data)}?lease_id={held['lease_id']}"
    url = f"{device.identity['control_url']}/api/v1{path}"
    return httpx.put(url, content=data, verify=device.tls, timeout=20)


def hand_in(device: FakeDevice, held: dict[str, Any], data: bytes, key: str = ORIN_KEY) -> httpx.Response:
    uploaded = upload(device, held, data)
    if not uploaded.is_success:
        return uploaded
    body = {"lease_id": held["lease_id"], "hardware_key": key, "engine": sha256(data)}
    return device.call("POST", f"/engine-builds/{held['build_id']}/complete", body)


def offer(device: FakeDevice, bench: Bench) -> dict[str, Any] | None:
    answer = device.call("POST", f"/device/engines/{bench.manifest}")
    assert answer.is_success, answer.text
    return answer.json() if answer.content else None


def prove(device: FakeDevice, offered: dict[str, Any], code: str | None = None) -> httpx.Response:
    body = {"lease_id": offered["lease_id"], "code": code, "reason": "said the test"}
    return device.call("POST", f"/engine-builds/{offered['build_id']}/prove", body)


def test_each_key_is_built_once_signed_proven_and_shared(bench: Bench, tmp_path: Path) -> None:
    first, second, older = bench.device("a"), bench.device("b"), bench.device("older", OLDER)
    bench.await_build("queued")
    assert sorted(row["hardware_key"] for row in bench.builds()) == [ORIN_KEY, OLDER_KEY]
    held = lease(first)
    assert held is not None
    assert (held["hardware_key"], held["manifest"]) == (ORIN_KEY, bench.manifest)
    assert lease(second) is None, "the key is being built"
    other = lease(older)
    assert other is not None
    assert other["hardware_key"].endswith("jetpack-6.0"), "what a device claims to be does not count"
    engine = build(bench.graph)
    assert hand_in(first, held, engine).is_success
    assert lease(second) is None, "it is built"
    assert hand_in(first, held, engine + b"again").status_code == 409
    assert bench.await_build("awaiting_signature")["built_by"] == f"device:{first.device_id}"
    assert offer(first, bench) is None, "nobody has signed it"
    assert "signed" in bench.sign(tmp_path)
    bench.await_build("proving")
    assert offer(first, bench) is None, "another device of the key is here to prove it"
    assert offer(older, bench) is None, "it is for another key"
    offered = offer(second, bench)
    assert offered is not None
    assert offer(second, bench) is None, "one proof at a time"
    assert prove(second, offered).is_success
    assert bench.await_build("shared")["reason"] == f"proven by device:{second.device_id}"
    for device in (first, second):
        shared = offer(device, bench)
        assert shared is not None
        assert (shared["digest"], shared["lease_id"]) == (offered["digest"], None)
        got = httpx.get(f"{device.identity['control_url']}/api/v1/blobs/{sha256(engine)}", verify=device.tls)
        assert got.content == engine
    actions = [one["action"] for one in bench.control.ok("GET", "/audit?limit=500")["items"]]
    assert {"engine.built", "engine.sign", "engine.listed", "engine.shared"} <= set(actions)


def test_a_dead_builder_loses_its_lease_to_another(bench: Bench) -> None:
    first, second = bench.device("a"), bench.device("b")
    bench.await_build("queued")
    held = lease(first)
    assert held is not None
    engine = build(bench.graph)
    taken: dict[str, Any] = {}
    wait_until(lambda: taken.update(lease(second) or {}) or taken, "the lease ends and the other has it")
    assert taken["build_id"] == held["build_id"]
    assert hand_in(first, held, engine).status_code == 409, "it came back too late"
    beat = first.call("POST", f"/engine-builds/{held['build_id']}/heartbeat", {"lease_id": held["lease_id"]})
    assert beat.status_code == 409
    assert hand_in(second, taken, engine).is_success
    row = bench.await_build("awaiting_signature")
    assert (row["built_by"], row["attempts"]) == (f"device:{second.device_id}", 2)
    assert [one["code"] for one in row["history"]] == ["builder_lost"]


def test_damaged_bytes_wrong_keys_and_slow_builders_are_refused_with_a_reason(bench: Bench) -> None:
    first, second = bench.device("a"), bench.device("b")
    bench.await_build("queued")
    engine = build(bench.graph)
    held = lease(first)
    assert held is not None
    damaged = upload(first, held, engine[:-1] + b"x", sha256(engine))
    assert damaged.status_code >= 400
    assert damaged.json()["code"] == "integrity"
    wrong = hand_in(first, held, engine, key="tensorrt-10.3.0.sm90.x86_64")
    assert wrong.status_code >= 400
    assert "the lease was for" in wrong.json()["detail"]
    row = bench.await_build("queued")
    assert [one["code"] for one in row["history"]] == ["wrong_key"]
    assert lease(first) is None, "who failed gives way to another that is here"
    held = lease(second)
    assert held is not None
    until = time.monotonic() + 20
    answer = None
    while time.monotonic() < until:  # alive, but never done
        answer = second.call("POST", f"/engine-builds/{held['build_id']}/heartbeat", {"lease_id": held["lease_id"]})
        if answer.status_code == 409:
            break
        time.sleep(LEASE_S / 4)
    assert answer is not None
    assert answer.status_code == 409
    row = bench.await_build("queued")
    assert [one["code"] for one in row["history"]] == ["wrong_key", "timed_out"]
    held = lease(first)  # the others have all failed: one more try, the last
    assert held is not None
    body = {"lease_id": held["lease_id"], "code": "engine_build_failed", "reason": "no kernel for this layer"}
    assert first.call("POST", f"/engine-builds/{held['build_id']}/fail", body).is_success
    row = bench.await_build("failed")
    assert row["reason"] == "engine_build_failed: no kernel for this layer"
    assert lease(second) is None, "three attempts are enough"


def test_an_engine_that_fails_its_proof_is_taken_back_and_built_again(bench: Bench, tmp_path: Path) -> None:
    first, second = bench.device("a"), bench.device("b")
    bench.await_build("queued")
    held = lease(first)
    assert held is not None
    wrong = build(bench.graph, "wrong")
    assert hand_in(first, held, wrong).is_success
    bench.await_build("awaiting_signature")
    bench.sign(tmp_path)
    bench.await_build("proving")
    offered = offer(second, bench)
    assert offered is not None
    assert prove(second, offered, "inaccurate").is_success
    row = bench.await_build("queued")
    assert [one["code"] for one in row["history"]] == ["inaccurate"]
    assert offer(second, bench) is None
    got = httpx.get(f"{second.identity['control_url']}/api/v1/blobs/{sha256(wrong)}", verify=second.tls)
    assert got.status_code == 404


def test_a_builder_machine_takes_only_the_keys_it_names(bench: Bench) -> None:
    bench.device("a")
    bench.await_build("queued")

    def ask(*keys: str) -> Any:
        return bench.control.ok("POST", "/engine-builds/lease", {"keys": list(keys)}, token="worker")

    assert ask() is None
    assert ask("tensorrt-10.3.0.sm90.x86_64", "nonsense") is None
    taken = []
    while (held := ask(ORIN_KEY)) is not None:  # also those that other tests left waiting
        taken.append(held["manifest"])
    assert bench.manifest in taken
    assert len(set(taken)) == len(taken)


def test_an_rtx_engine_is_built_without_a_gpu_by_the_builder_command(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version("tensorrt-rtx-cu13-bindings")
    rtx = Hardware(
        profile="rtx", targets=["cpu-x86"], architecture="x86_64", compute_capability="8.9", driver="580.65",
        runtimes={"onnxruntime": "1.32.0", "tensorrt-rtx": version},
    )  # fmt: skip
    key = f"tensorrt-rtx-{version}.sm89.x86_64"
    device = bench.device("rtx", rtx)
    bench.await_build("queued", key=key)
    monkeypatch.setenv("FORESHORE_URL", bench.control.url)
    monkeypatch.setenv("FORESHORE_TOKEN_FILE", str(bench.control.home / "tokens" / "worker"))
    words = ["builder", "--capability", "8.9", "--capability", "8.6", "--home", str(tmp_path / "builder"), "--once"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, (said.output, said.exception)
    assert f"{bench.name} for {key}: built" in said.output
    row = bench.await_build("awaiting_signature", key=key)
    assert row["built_by"].startswith("builder:")
    bench.sign(tmp_path)
    bench.await_build("proving", key=key)
    offered = offer(device, bench)
    assert offered is not None
    assert prove(device, offered).is_success
    built = parse_engine_build(base64.b64decode(offered["document"]))
    got = httpx.get(f"{device.identity['control_url']}/api/v1/blobs/{built.engine}", verify=device.tls)
    assert len(got.content) == built.size_bytes > 10_000
    assert not list((tmp_path / "builder").iterdir()), "nothing is left behind"


def test_a_kill_of_the_control_plane_loses_neither_lease_nor_build(bench: Bench) -> None:
    device = bench.device("a")
    bench.await_build("queued")
    held = lease(device)
    assert held is not None
    bench.control.kill()
    bench.control.start()
    engine = build(bench.graph)
    answer = hand_in(device, held, engine)
    if answer.status_code == 409:  # the lease ended while the control plane was away
        again: dict[str, Any] = {}
        wait_until(lambda: again.update(lease(device) or {}) or again, "it is free again")
        assert again["build_id"] == held["build_id"]
        answer = hand_in(device, again, engine)
    assert answer.is_success
    assert bench.await_build("awaiting_signature")["built_by"] == f"device:{device.device_id}"
    assert len(bench.builds()) == 1


def test_a_rollout_skips_who_cannot_run_it_before_a_byte_is_sent(control: ControlProcess) -> None:
    needs = Requirements(cpu_features=["avx512_vnni"])
    release = control.publish("picky", b"some bytes", "1.0.0", requires=needs)
    good, poor = FakeDevice(control, "picky-good"), FakeDevice(control, "picky-poor")
    for device, feature in ((good, "avx512_vnni"), (poor, "avx2")):
        device.hardware = Hardware(profile="x86", targets=["cpu-x86"], architecture="x86_64", cpu_features=[feature])
        device.connect()
        wait_until(lambda d=device: control.ok("GET", f"/devices/{d.device_id}")["reported"], "it reports")  # type: ignore[misc]
    control.ok("POST", "/groups", {"name": "picky", "device_ids": ["picky-good", "picky-poor"]})
    rollout = control.ok("POST", "/rollouts", {"release": release["release"], "group": "picky", "start": True})
    done = wait_until(
        lambda: (r := control.ok("GET", f"/rollouts/{rollout['rollout_id']}"))["status"] == "succeeded" and r, "the end"
    )
    reasons = {one["device_id"]: one.get("reason") or "" for one in done["devices"]}
    assert "needs processor features avx512_vnni, here are all but avx512_vnni (cpu_features)" in reasons["picky-poor"]
    choices = {one["device_id"]: one["choice"] for one in done["devices"]}
    assert choices["picky-good"].startswith("cpu-x86 runs: none of")
    assert poor.desired is None or not poor.desired.models
    fits = {one["device_id"]: one for one in control.ok("GET", "/models/picky/compatibility?limit=500")["items"]}
    assert (fits["picky-good"]["target"], fits["picky-poor"]["target"]) == ("cpu-x86", None)
    assert fits["picky-poor"]["rule"] == "cpu_features"
    environment = {"FORESHORE_URL": control.url, "FORESHORE_TOKEN_FILE": str(control.home / "tokens" / "admin")}
    said = CliRunner().invoke(app, ["models", "compatibility", "picky", "--version", "1.0.0"], env=environment)
    assert said.exit_code == 0, said.output
    assert "cpu_features" in said.output
    page = httpx.get(f"{control.url}/models/picky", cookies=_session(control), follow_redirects=True)
    assert "Compatibility with the fleet" in page.text
    signed_by = control.ok("GET", "/models/picky")["releases"][0]["signed_by"]
    assert f"publisher {signed_by['publisher']}" in page.text
    assert all(key[:8] in page.text for key in signed_by["keys"])
    assert "needs processor features avx512_vnni" in page.text
    for device in (good, poor):
        device.close()


def _session(control: ControlProcess) -> dict[str, str]:
    with httpx.Client(base_url=control.url) as client:
        assert client.post("/login", data={"token": control.token(), "next": "/"}).status_code == 303
        return dict(client.cookies)
