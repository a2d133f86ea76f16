"""A real agent as a Jetson with a simulated TensorRT: it uses only engines that a publisher listed for its hardware
key, answers by ONNX Runtime in every other case, and builds for others when it has time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from typer.testing import CliRunner

from cloud.cli import app
from compiler.graph_facts import graph_facts
from model_registry.manifest import EngineBuild, sha256
from tests.fakes.agent_plane import TENANT, AgentProcess, Plane, golden_bytes, tiny_model
from tests.fakes.control import ControlProcess, wait_until
from tests.fakes.simulated_tensorrt import VARIABLE, build

KEY = "tensorrt-10.3.0.sm87.aarch64.jetpack-6.2"
ENGINE = {
    "runtime": "tensorrt", "runtime_version": "10.3.0", "module": "tests.fakes.simulated_tensorrt",
    "compute_capability": "8.7", "jetpack": "6.2", "architecture": "aarch64", "poll_s": 0.2, "min_idle_s": 0,
}  # fmt: skip
BUILDER = [sys.executable, "-m", "tests.fakes.simulated_tensorrt", "{graph}", "{engine}"]


class Simulation:
    """The files by which a test steers the simulated TensorRT and sees what it opened."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "simulation"
        os.environ[VARIABLE] = str(self.file)

    def fault(self, word: str) -> None:
        self.file.write_text(word)

    @property
    def opened(self) -> set[str]:
        log = Path(f"{self.file}.opened")
        return set(log.read_text().split()) if log.exists() else set()


@pytest.fixture
def simulation(tmp_path: Path) -> Iterator[Simulation]:
    yield Simulation(tmp_path)
    os.environ.pop(VARIABLE, None)


def profile(folder: Path, **engine: Any) -> str:
    """A profile of a Jetson; `engine` changes its settings."""
    path = folder / "profile.yaml"
    document = {
        "name": "jetson", "targets": ["cpu-x86"], "memory_budget_bytes": 1 << 30, "reconnect_max_s": 0.5,
        "fetch_stall_s": 2, "healthy_after_s": 0.2, "engine": {**ENGINE, **engine},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(document))
    return str(path)


# against a control plane that may lie


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    plane = Plane(tmp_path / "plane")
    yield plane
    plane.close()


@pytest.fixture
def agent(plane: Plane, tmp_path: Path, simulation: Simulation) -> Iterator[AgentProcess]:
    agent = AgentProcess(tmp_path / "home")
    agent.enrol(plane.url, profile(tmp_path))
    agent.start()
    yield agent
    agent.stop()


def built_for(manifest: str, engine: bytes, **changes: Any) -> EngineBuild:
    facts = {
        "tenant": TENANT, "name": "tiny", "manifest": manifest, "hardware_key": KEY, "builder": "tensorrt",
        "builder_version": "10.3.0", "engine": sha256(engine), "size_bytes": len(engine), "built_by": "device:other",
        "built_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return EngineBuild(**{**facts, **changes})


def test_foreign_unsigned_and_damaged_engines_are_never_opened(
    plane: Plane, agent: AgentProcess, simulation: Simulation
) -> None:
    wish = plane.publish(2.0, "1.0.0")
    plane.wish(wish)
    plane.await_model(lambda m: m["phase"] == "committed")
    engine = build(tiny_model(2.0))
    other = "tensorrt-10.3.0.sm90.x86_64"
    refused = [
        (built_for(wish.manifest, engine, built_by="nobody"), engine, False, "release_not_listed"),
        (built_for(wish.manifest, engine, hardware_key=other), engine, True, "refused"),
        (built_for("f" * 64, engine), engine, True, "refused"),
        (built_for(wish.manifest, engine, tenant="other"), engine, True, "refused"),
        (built_for(wish.manifest, engine, built_by="a"), engine[:-1] + b"x", True, "integrity"),
        (built_for(wish.manifest, engine, built_by="b"), engine + b"more", True, "integrity"),
    ]
    for built, served, is_listed, code in refused:
        plane.offer_engine(built, served, is_listed=is_listed)
        plane.engine_offers[wish.manifest] = plane.engine_offers[built.manifest]
        before = len(plane.proofs)
        wait_until(lambda n=before: len(plane.proofs) > n + 1, f"{code} is told")  # type: ignore[misc]
        assert plane.proofs[-1]["code"] == code, plane.proofs[-1]
        assert agent.scale() == 2.0
    assert simulation.opened == set()
    noted = plane.await_model(lambda m: "integrity" in (m.get("engine_note") or ""))
    assert noted["runtime"] == "onnxruntime"


def test_a_listed_engine_is_proven_used_and_left_when_it_fails(
    plane: Plane, agent: AgentProcess, simulation: Simulation
) -> None:
    wish = plane.publish(2.0, "1.0.0")
    plane.wish(wish)
    plane.await_model(lambda m: m["phase"] == "committed")
    wrong = build(tiny_model(2.0), "wrong")
    plane.offer_engine(built_for(wish.manifest, wrong), wrong)
    wait_until(lambda: plane.proofs, "the wrong engine is tried")
    assert plane.proofs[-1]["code"] == "inaccurate"
    assert agent.scale() == 2.0
    engine = build(tiny_model(2.0))
    plane.offer_engine(built_for(wish.manifest, engine), engine)
    used = plane.await_model(lambda m: m.get("runtime") == "tensorrt")
    assert (used["engine"], used["providers"]) == (sha256(engine), ["SimulatedTensorrt"])
    assert plane.proofs[-1]["code"] is None
    assert agent.scale() == 2.0

    agent.stop()  # what was accepted is used again without asking anybody
    plane.engine_offers.clear()
    plane.reported.clear()
    agent.start()
    plane.await_model(lambda m: m.get("runtime") == "tensorrt")

    simulation.fault("break")
    begun = time.monotonic()
    assert agent.scale() == 2.0, "the request that broke the engine is answered"
    answered_s = time.monotonic() - begun
    left = plane.await_model(lambda m: (m.get("engine_note") or "").startswith("engine_failed: RuntimeError: CUDA"))
    assert left["runtime"] == "onnxruntime"
    assert left.get("engine") is None
    wait_until(lambda: any("CUDA error 719" in str(e["body"]) for e in plane.events), "an alarm says so")
    print(f"\nanswered by ONNX Runtime {answered_s:.3f} s after the engine failed")  # noqa: T201 - the figure
    num_opened = len(simulation.opened)
    time.sleep(1)  # several looks for an engine
    assert len(simulation.opened) == num_opened, "it is not tried again"


# against the real control plane


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path_factory.mktemp("control"))
    process.options = ["--engine-lease-s", "2"]
    process.start()
    yield process
    assert process.stop() == 0


def enrolled(control: ControlProcess, name: str, folder: Path, **engine: Any) -> AgentProcess:
    folder.mkdir()
    agent = AgentProcess(folder / "home")
    token = control.ok("POST", "/enrolments", {"device_id": name})["enrolment_token"]
    agent.enrol(control.device_url, profile(folder, **engine), token)
    agent.start()
    return agent


def state_of(control: ControlProcess, name: str) -> dict[str, Any]:
    models = (control.ok("GET", f"/devices/{name}")["reported"] or {}).get("models") or [{}]
    return dict(models[0])


def test_a_device_builds_dies_another_builds_and_both_use_the_one_engine(
    control: ControlProcess, tmp_path: Path, simulation: Simulation
) -> None:
    graph = tiny_model(2.0)

    facts = graph_facts(onnx.load_from_string(graph))
    release = control.publish("tiny", graph, "1.0.0", golden=golden_bytes(2.0), graph=facts)
    simulation.fault("slow")
    agents = {"orin-1": enrolled(control, "orin-1", tmp_path / "one", build=BUILDER)}
    try:
        control.ok("POST", "/rollouts", {"release": release["release"], "group": "all", "joins": True, "start": True})

        def build_row() -> dict[str, Any]:
            return dict((control.ok("GET", "/engine-builds")["items"] or [{}])[0])

        wait_until(lambda: build_row().get("state") == "building", "the canary builds in its idle time")
        assert build_row()["holder"] == "device:orin-1"
        agents["orin-1"].kill()
        simulation.fault("")
        agents["orin-2"] = enrolled(control, "orin-2", tmp_path / "two", build=BUILDER)
        wait_until(lambda: build_row()["state"] == "awaiting_signature", "the other takes the lease over", 40)
        assert build_row()["built_by"] == "device:orin-2"
        assert state_of(control, "orin-2")["runtime"] == "onnxruntime", "nobody has signed it"
        environment = {"FORESHORE_URL": control.url, "FORESHORE_TOKEN_FILE": str(control.home / "tokens" / "admin")}
        words = ["engines", "sign", "--yes", "--folder", str(control.home / "offline")]
        signed = CliRunner().invoke(app, words, env=environment)
        assert signed.exit_code == 0, (signed.output, signed.exception)
        agents["orin-1"].start()
        for name in agents:
            wait_until(lambda n=name: state_of(control, n).get("runtime") == "tensorrt", f"{name} uses it", 40)  # type: ignore[misc]
        row = build_row()
        assert (row["state"], row["attempts"]) == ("shared", 2)
        assert [one["code"] for one in row["history"]] == ["builder_lost"]
        engines = {state_of(control, name)["engine"] for name in agents}
        assert engines == simulation.opened, "one engine, and no other was ever opened"
        assert all(agent.scale() == 2.0 for agent in agents.values())
    finally:
        for agent in agents.values():
            agent.stop()


@pytest.mark.skipif(os.environ.get("FORESHORE_FAULTS") != "all", reason="25 s; the lying plane above is the sample")
def test_a_builder_that_makes_rubbish_is_told_on_and_onnxruntime_answers(
    control: ControlProcess, tmp_path: Path, simulation: Simulation
) -> None:
    graph = tiny_model(3.0)

    facts = graph_facts(onnx.load_from_string(graph))
    release = control.publish("tiny", graph, "2.0.0", golden=golden_bytes(3.0), graph=facts)
    simulation.fault("garbage")
    agent = enrolled(control, "orin-3", tmp_path / "three", build=BUILDER)
    try:
        control.ok("POST", "/groups", {"name": "three", "device_ids": ["orin-3"]})
        order = {"release": release["release"], "group": "three", "start": True}
        control.ok("POST", "/rollouts", order)
        manifest = release["manifest"].digest

        def row() -> dict[str, Any]:
            rows = control.ok("GET", "/engine-builds?limit=500")["items"]
            return next((one for one in rows if one["manifest"] == manifest), {})

        wait_until(lambda: row().get("state") == "failed", "three attempts, all refused by golden inputs", 60)
        assert [one["code"] for one in row()["history"]] == ["corrupt_engine"] * 3
        assert agent.scale() == 3.0
        state = wait_until(
            lambda: (s := state_of(control, "orin-3")).get("engine_note") and s, "the device says so in its report"
        )
        assert state["runtime"] == "onnxruntime"
        assert "corrupt_engine" in state["engine_note"]
    finally:
        agent.stop()
