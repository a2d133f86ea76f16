"""`foreshore keys` and `foreshore bundle` as people use them, against a real control plane."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cloud.cli import app
from tests.fakes.control import ControlProcess, FakeDevice, wait_until

Run = Callable[..., Any]


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    control = ControlProcess(tmp_path / "control")
    yield control
    control.stop()


@pytest.fixture
def run(control: ControlProcess, tmp_path: Path) -> Run:
    """One command; its JSON."""
    environment = {
        "FORESHORE_URL": control.url,
        "FORESHORE_TOKEN_FILE": str(control.home / "tokens" / "admin"),
        "XDG_CONFIG_HOME": str(tmp_path),
    }

    def run(*words: object) -> Any:
        done = CliRunner().invoke(app, [*map(str, words), "--json"], env=environment)
        assert done.exit_code == 0, f"{words}: {done.output} {done.exception}"
        return json.loads(done.output)

    return run


def test_two_of_two_must_sign_before_a_change_counts(control: ControlProcess, run: Run, tmp_path: Path) -> None:
    control.start(has_trust=False)
    alice, bob = tmp_path / "alice", tmp_path / "bob"
    of_bob = {name: run("keys", "create", bob / f"{name}.pem")["public_key"] for name in ("root", "targets")}
    both = ["--root-key", of_bob["root"], "--root-threshold", 2, "--targets-key", of_bob["targets"]]
    begun = run("keys", "init", "--folder", alice, "--publisher", "alice", *both, "--targets-threshold", 2)
    assert begun["waiting"] == ["root 1: 1 of 2", "targets 1: 1 of 2"]
    assert run("keys", "list")["roles"] == []
    assert run("keys", "sign", "--folder", alice)["signed"] == []  # nobody signs twice
    assert run("keys", "sign", "--folder", bob)["signed"] == ["root", "targets"]
    assert roles_of(run) == {"root": 1, "targets": 1, "snapshot": 1, "timestamp": 1}

    own = run("keys", "show", alice / "publisher.pem")["public_key"]
    run("keys", "add-publisher", "alice", "--public-key", own, "--folder", alice)
    assert roles_of(run)["targets"] == 1
    assert run("keys", "sign", "--folder", bob)["signed"] == ["targets"]
    assert roles_of(run)["targets"] == 2
    assert roles_of(run)["alice"] == 1

    before = keys_of(run, "timestamp")
    assert run("keys", "rotate", "timestamp", "--folder", alice)["waiting"] == ["root 2: 1 of 2"]
    assert keys_of(run, "timestamp") == before
    run("keys", "sign", "--folder", bob)
    assert keys_of(run, "timestamp") != before
    assert roles_of(run)["root"] == 2

    new = run("keys", "create", tmp_path / "new.pem")["public_key"]
    run("keys", "rotate", "root", "--public-key", new, "--threshold", 1, "--folder", alice)
    run("keys", "sign", "--folder", bob)
    assert roles_of(run)["root"] == 2  # the new key has not signed yet
    (tmp_path / "carol").mkdir()
    (tmp_path / "new.pem").rename(tmp_path / "carol" / "root.pem")
    assert run("keys", "sign", "--folder", tmp_path / "carol")["signed"] == ["root"]
    assert roles_of(run)["root"] == 3


def test_a_bundle_holds_all_that_a_device_without_a_network_needs(
    control: ControlProcess, run: Run, tmp_path: Path
) -> None:
    control.start()
    device = FakeDevice(control, "dock-1")
    payload = bytes(range(256)) * 512
    published = control.publish("vision", payload)
    device.connect()
    wait_until(lambda: control.ok("GET", "/devices/dock-1")["reported"], "the device reports")
    control.ok("POST", "/rollouts", {"release": published["release"], "start": True})
    wait_until(lambda: control.ok("GET", "/devices/dock-1")["desired"]["models"], "the device is to have the model")
    written = run("bundle", "create", tmp_path / "update.tar", "--device", "dock-1")
    device.close()
    with tarfile.open(tmp_path / "update.tar") as file:
        names = {name.split("/", 1)[0]: name for name in file.getnames()}
        chunks = {name.rsplit("/", 1)[-1] for name in file.getnames() if "chunks/" in name}
    assert {chunk.digest for chunk in published["manifest"].chunk_list()} <= chunks
    assert {"metadata", "assignments", "releases", "manifests", "chunks"} <= set(names)
    assert names["assignments"].endswith("default.dock-1")
    assert written["size_bytes"] > len(payload) / 2


def test_a_withdrawn_release_is_signed_by_nobody_and_not_rolled_out_again(
    control: ControlProcess, run: Run, tmp_path: Path
) -> None:
    control.start()
    first, second = (control.publish("vision", payload) for payload in (b"one" * 100, b"two" * 100))
    draft = control.ok("POST", "/rollouts", {"release": first["release"], "start": False})
    path = tmp_path / "keys"
    (control.home / "offline").rename(path)
    versions = [one["version"] for one in control.ok("GET", "/models/vision")["releases"]]
    done = run("keys", "withdraw", "vision", versions[-1], "--folder", path)
    assert (done["publisher"], done["waiting"]) == ("tests", [])
    signed = {one["digest"]: one["signed_by"] for one in control.ok("GET", "/models/vision")["releases"]}
    assert signed[first["release"]] is None
    assert signed[second["release"]]["publisher"] == "tests"
    refused = control.call("POST", "/rollouts", {"release": first["release"], "start": True})
    started = control.call("POST", f"/rollouts/{draft['rollout_id']}/start")
    for answer in (refused, started):
        assert answer.status_code == 409
        assert "no publisher lists vision" in answer.text
    control.ok("POST", "/rollouts", {"release": second["release"], "start": True})


def roles_of(run: Run) -> dict[str, int]:
    return {str(one["role"]): int(one["version"]) for one in run("keys", "list")["roles"]}


def keys_of(run: Run, name: str) -> list[str]:
    root = next(one for one in run("keys", "list")["roles"] if one["role"] == "root")
    return list(root["keys"][name]["key_ids"])
