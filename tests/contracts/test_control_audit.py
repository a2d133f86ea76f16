"""Every change through the API leaves an audit entry, and the chain can be taken away and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from cloud.cli import app
from cloud.control.audit_chain import check_export
from edge_agent.credentials import FileKeys
from tests.fakes.control import ControlProcess, FakeDevice, wait_until

CHANGES_NOTHING = {
    ("POST", "/api/v1/tokens/introspect"): "looks a token up",
    ("POST", "/api/v1/jobs/lease"): "work comes and goes; its end is audited",
    ("POST", "/api/v1/jobs/{job_id}/heartbeat"): "work comes and goes; its end is audited",
    ("POST", "/api/v1/engine-builds/lease"): "work comes and goes; its end is audited",
    ("POST", "/api/v1/engine-builds/{build_id}/heartbeat"): "work comes and goes; its end is audited",
    (
        "PUT",
        "/api/v1/engine-builds/{build_id}/engine/{digest}",
    ): "content, named by its digest; what uses it is audited",
    ("POST", "/api/v1/device/engines/{manifest}"): "a device asks; what it found is audited",
    ("POST", "/api/v1/decisions"): "records are a log of their own",
    ("PUT", "/api/v1/blobs/{digest}"): "content, named by its digest; what uses it is audited",
}
NEEDS_A_COMPILER = {  # or a builder of engines: tests/contracts/test_engine_builds.py looks at the trail
    ("POST", "/api/v1/engine-builds/{build_id}/complete"),
    ("POST", "/api/v1/engine-builds/{build_id}/fail"),
    ("POST", "/api/v1/engine-builds/{build_id}/sign"),
    ("POST", "/api/v1/engine-builds/{build_id}/prove"),
    ("POST", "/api/v1/jobs/{job_id}/fail"),
    ("POST", "/api/v1/jobs/{job_id}/cancel"),
    ("POST", "/api/v1/publications/{publication_id}/cancel"),
}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path_factory.mktemp("audit"))
    process.start()
    yield process
    assert process.stop() == 0


class Recorder:
    """Calls the API and notes which routes were used and which actions they left."""

    def __init__(self, control: ControlProcess) -> None:
        self.control = control
        self.used: set[tuple[str, str]] = set()

    def call(self, method: str, route: str, expected: str, body: Any = None, **names: str) -> Any:
        answer = self.control.ok(method, route.format(**names), body)
        self.used.add((method, f"/api/v1{route}"))
        actions = [entry["action"] for entry in self.control.ok("GET", "/audit?limit=20")["items"]]
        assert expected in actions, (route, actions)
        return answer


def test_every_route_that_changes_something_leaves_an_entry(control: ControlProcess) -> None:
    recorder = Recorder(control)
    call = recorder.call
    device = FakeDevice(control, "dock-1")
    recorder.used |= {("POST", "/api/v1/enrolments"), ("POST", "/api/v1/enrol")}
    device.connect()
    wait_until(lambda: control.ok("GET", "/devices/dock-1")["reported"], "the device reports")
    keys = FileKeys()
    assert device.call("POST", "/device/certificate", {"csr_pem": keys.request(keys.create())}).is_success
    assert device.call("POST", "/device/certificate/confirm", {}).is_success
    recorder.used |= {("POST", "/api/v1/device/certificate"), ("POST", "/api/v1/device/certificate/confirm")}
    release = control.publish("audited", os.urandom(500), "1.0")
    for route in (
        "trust/metadata",
        "trust/online-keys",
        "publications",
        "publications/{publication_id}/sign",
        "jobs/{job_id}/complete",
    ):
        recorder.used.add(("POST", f"/api/v1/{route}"))
    call("PUT", "/devices/{device_id}/labels", "device.label", {"labels": {"site": "x"}}, device_id="dock-1")
    call("POST", "/groups", "group.put", {"name": "g", "filter": "label.site = x"})
    call("PUT", "/groups/{name}", "group.put", {"device_ids": ["dock-1"]}, name="g")
    token = call("POST", "/tokens", "token.create", {"name": "t", "role": "viewer"})
    call("DELETE", "/tokens/{token_id}", "token.revoke", token_id=token["token_id"])
    hook = call("POST", "/webhooks", "webhook.create", {"url": "http://127.0.0.1:9/", "actions": ["token.*"]})
    named = {"webhook_id": hook["webhook_id"]}
    delivery = call("POST", "/webhooks/{webhook_id}/ping", "webhook.ping", **named)
    path = "/webhook-deliveries/{delivery_id}/resend"
    call("POST", path, "webhook.resend", delivery_id=delivery["delivery_id"])
    call("DELETE", "/webhooks/{webhook_id}", "webhook.delete", **named)
    made = call("POST", "/rollouts", "rollout.create", {"release": release["release"], "group": "g"})
    path = "/rollouts/{rollout_id}/{order}"
    call("POST", path, "rollout.start", {"reason": "why not"}, rollout_id=made["rollout_id"], order="start")
    wait_until(lambda: control.ok("GET", f"/rollouts/{made['rollout_id']}")["status"] == "succeeded", "the end")
    call("DELETE", "/groups/{name}", "group.delete", name="g")
    call("DELETE", "/devices/{device_id}", "device.revoke", device_id="dock-1")
    device.close()

    actions = [(e["action"], e["actor"]) for e in control.ok("GET", "/audit?limit=500")["items"]]
    by_machine = {("rollout.running", "rollout-engine"), ("rollout.succeeded", "rollout-engine"),
                  ("device.wish", "rollout-engine")}  # fmt: skip
    by_person = {("enrolment.create", "admin"), ("publication.create", "admin"), ("release.sign", "admin")}
    by_device = {("certificate.renew", "device:dock-1"), ("certificate.confirm", "device:dock-1")}
    assert by_machine | by_person | by_device <= set(actions)
    routes = {
        (method.upper(), path)
        for path, methods in httpx.get(f"{control.url}/api/openapi.json").json()["paths"].items()
        for method in methods
        if method in ("post", "put", "patch", "delete")
    }
    assert routes - recorder.used - set(CHANGES_NOTHING) - NEEDS_A_COMPILER == set(), "say what these leave"


def test_the_exported_chain_is_whole_and_ends_where_the_control_plane_says(control: ControlProcess) -> None:
    control.ok("POST", "/groups", {"name": "taken", "filter": "online = true"})
    exported = control.call("GET", "/audit/export")
    found = check_export(exported.content.splitlines(keepends=True))
    verified = control.ok("GET", "/audit/verify")
    assert found.fault is None
    assert (found.num_entries, found.head) == (verified["entries"], verified["head"])
    viewer = control.ok("POST", "/tokens", {"name": "v", "role": "viewer"})["token"]
    assert control.call("GET", "/audit/export", token=viewer).status_code == 403


def test_the_command_line_steers_labels_groups_rollouts_webhooks_and_the_chain(
    control: ControlProcess, tmp_path: Path
) -> None:
    environment = {"FORESHORE_URL": control.url, "FORESHORE_TOKEN_FILE": str(control.home / "tokens" / "admin")}

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, list(words), env=environment)
        assert result.exit_code == 0, (words, result.output, result.exception)
        return result.output

    device = FakeDevice(control, "cli-1")
    device.connect()
    wait_until(lambda: control.ok("GET", "/devices/cli-1")["reported"], "the device reports")
    control.publish("spoken", os.urandom(500), "1.0")
    run("devices", "label", "cli-1", "site=hamburg", "floor=3")
    run("devices", "label", "cli-1", "floor=")
    assert control.ok("GET", "/devices/cli-1")["labels"] == {"site": "hamburg"}
    assert "cli-1" in run("devices", "list", "--filter", "label.site = ham*")
    run("groups", "create", "cli", "--filter", "label.site = hamburg")
    options = ["--group", "cli", "--pace", "60/min x2 every 10 max 600", "--window", "02:00-04:00 sat,sun", "--joins"]
    made = json.loads(run("rollouts", "create", "spoken@1.0", *options, "--no-start", "--json"))
    assert (made["status"], made["window"]["weekdays"], made["joins"]) == ("draft", [5, 6], True)
    run("rollouts", "start", made["rollout_id"], "--reason", "from the terminal")
    assert "succeeded" in run("rollouts", "watch", made["rollout_id"], "--timeout-s", "30")
    assert run("webhooks", "create", "http://127.0.0.1:9/", "--action", "rollout.*").startswith("whsec_")
    assert "http://127.0.0.1:9/" in run("webhooks")
    assert "from the terminal" in run("audit", "list", "--action", "rollout.start", "--json")
    assert "whole" in run("audit", "verify")
    run("audit", "export", str(tmp_path / "chain.jsonl"))
    assert "whole" in run("audit", "verify", str(tmp_path / "chain.jsonl"))
    device.close()
