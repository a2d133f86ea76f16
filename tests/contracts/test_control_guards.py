"""Who may call what: every route of the API, asked as everyone. A route that is not in the table fails the test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import BaseRoute

from tests.fakes.control_app import LADDER, ControlApp, ask, control_app

OPEN, VIEWER, OPERATOR, PUBLISHER, ADMIN = "none", "viewer", "operator", "publisher", "admin"
WORKER, GATEWAY, DEVICE = "worker", "gateway", "device"

MAY_CALL: dict[str, tuple[str, ...]] = {
    "GET /healthz": (OPEN,),
    "GET /metrics": (OPEN,),  # on loopback, where this test is
    "GET /api/v1/healthz": (OPEN,),
    "GET /api/v1/metrics": (OPEN,),
    "GET /api/v1/authority": (OPEN,),
    "POST /api/v1/enrol": (OPEN,),
    "POST /api/v1/enrolments": (OPERATOR,),
    "GET /api/v1/tokens": (ADMIN,),
    "POST /api/v1/tokens": (ADMIN,),
    "DELETE /api/v1/tokens/{token_id}": (ADMIN,),
    "POST /api/v1/tokens/introspect": (GATEWAY,),
    "GET /api/v1/whoami": (VIEWER,),
    "GET /api/v1/trust": (VIEWER,),
    "GET /api/v1/trust/metadata/{name}": (VIEWER, DEVICE),
    "POST /api/v1/trust/metadata": (PUBLISHER,),
    "POST /api/v1/trust/online-keys": (ADMIN,),
    "GET /api/v1/devices/{device_id}/desired": (OPERATOR,),
    "GET /api/v1/device/desired": (DEVICE,),
    "POST /api/v1/device/certificate": (DEVICE,),
    "POST /api/v1/device/certificate/confirm": (DEVICE,),
    "PUT /api/v1/blobs/{digest}": (PUBLISHER, WORKER),
    "GET /api/v1/blobs/{digest}": (VIEWER, WORKER, DEVICE),
    "HEAD /api/v1/blobs/{digest}": (VIEWER, WORKER, DEVICE),
    "GET /api/v1/chunks/{digest}": (VIEWER, WORKER, DEVICE),
    "GET /api/v1/manifests/{digest}": (VIEWER, WORKER, DEVICE),
    "GET /api/v1/releases/{digest}": (VIEWER, WORKER, DEVICE),
    "GET /api/v1/releases": (VIEWER,),
    "GET /api/v1/models": (VIEWER,),
    "GET /api/v1/models/{name}": (VIEWER,),
    "GET /api/v1/models/{name}/compatibility": (VIEWER,),
    "POST /api/v1/publications": (PUBLISHER,),
    "GET /api/v1/publications": (VIEWER,),
    "GET /api/v1/publications/{publication_id}": (VIEWER,),
    "GET /api/v1/publications/{publication_id}/events": (VIEWER,),
    "POST /api/v1/publications/{publication_id}/sign": (PUBLISHER,),
    "POST /api/v1/publications/{publication_id}/cancel": (PUBLISHER,),
    "GET /api/v1/jobs": (VIEWER,),
    "GET /api/v1/jobs/{job_id}": (VIEWER,),
    "POST /api/v1/jobs/lease": (WORKER,),
    "POST /api/v1/jobs/{job_id}/heartbeat": (WORKER,),
    "POST /api/v1/jobs/{job_id}/complete": (WORKER,),
    "POST /api/v1/jobs/{job_id}/fail": (WORKER,),
    "POST /api/v1/jobs/{job_id}/cancel": (PUBLISHER,),
    "GET /api/v1/engine-builds": (VIEWER,),
    "GET /api/v1/engine-builds/{build_id}": (VIEWER,),
    "POST /api/v1/engine-builds/lease": (WORKER, DEVICE),
    "POST /api/v1/engine-builds/{build_id}/heartbeat": (WORKER, DEVICE),
    "PUT /api/v1/engine-builds/{build_id}/engine/{digest}": (WORKER, DEVICE),
    "POST /api/v1/engine-builds/{build_id}/complete": (WORKER, DEVICE),
    "POST /api/v1/engine-builds/{build_id}/fail": (WORKER, DEVICE),
    "POST /api/v1/engine-builds/{build_id}/sign": (PUBLISHER,),
    "POST /api/v1/engine-builds/{build_id}/prove": (DEVICE,),
    "POST /api/v1/device/engines/{manifest}": (DEVICE,),
    "GET /api/v1/devices": (VIEWER,),
    "GET /api/v1/devices/{device_id}": (VIEWER,),
    "DELETE /api/v1/devices/{device_id}": (OPERATOR,),
    "PUT /api/v1/devices/{device_id}/labels": (OPERATOR,),
    "GET /api/v1/groups": (VIEWER,),
    "POST /api/v1/groups": (OPERATOR,),
    "PUT /api/v1/groups/{name}": (OPERATOR,),
    "DELETE /api/v1/groups/{name}": (OPERATOR,),
    "GET /api/v1/rollouts": (VIEWER,),
    "POST /api/v1/rollouts": (OPERATOR,),
    "GET /api/v1/rollouts/{rollout_id}": (VIEWER,),
    "POST /api/v1/rollouts/{rollout_id}/{order}": (OPERATOR,),
    "GET /api/v1/decisions": (VIEWER,),
    "POST /api/v1/decisions": (GATEWAY,),
    "GET /api/v1/decisions/{decision_id}": (VIEWER,),
    "GET /api/v1/audit": (ADMIN,),
    "GET /api/v1/audit/verify": (ADMIN,),
    "GET /api/v1/audit/export": (ADMIN,),
    "GET /api/v1/webhooks": (ADMIN,),
    "POST /api/v1/webhooks": (ADMIN,),
    "DELETE /api/v1/webhooks/{webhook_id}": (ADMIN,),
    "POST /api/v1/webhooks/{webhook_id}/ping": (ADMIN,),
    "GET /api/v1/webhooks/{webhook_id}/deliveries": (ADMIN,),
    "POST /api/v1/webhook-deliveries/{delivery_id}/resend": (ADMIN,),
    "GET /api/v1/events": (VIEWER,),
}
"""The lowest rung of the ladder that may, and the roles off the ladder that may besides."""

VALUES = {"digest": "f" * 64, "order": "start"}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlApp]:
    with control_app(tmp_path_factory.mktemp("guards")) as app:
        yield app


def address(path: str) -> str:
    """The path with harmless values in it."""
    return re.sub(r"{(\w+)}", lambda match: VALUES.get(match[1], "no-such"), path)


def may(role: str, allowed: tuple[str, ...]) -> bool:
    """Whether the table lets `role` in."""
    rungs = [LADDER.index(one) for one in allowed if one in LADDER]
    return OPEN in allowed or role in allowed or (role in LADDER and any(LADDER.index(role) >= rung for rung in rungs))


def test_the_table_names_every_route_and_nothing_else(control: ControlApp) -> None:
    assert {f"{method} {path}" for method, path in control.operations()} == set(MAY_CALL)


@pytest.mark.parametrize("role", [OPEN, *LADDER, WORKER, GATEWAY])
def test_a_token_opens_what_its_role_may_and_nothing_else(control: ControlApp, role: str) -> None:
    client = control.client(role)
    for operation, allowed in MAY_CALL.items():
        method, path = operation.split(" ")
        status = ask(client, method, address(path)).status_code
        if may(role, allowed):
            assert status not in (401, 403), operation
            assert status < 500, operation
        else:
            assert status == (401 if role == OPEN else 403), operation


def test_a_certificate_opens_what_a_device_may_and_nothing_else(control: ControlApp) -> None:
    client = control.device_client(control.enrol("guarded")["serial"])
    for operation, allowed in MAY_CALL.items():
        method, path = operation.split(" ")
        if not path.startswith("/api/v1/"):
            assert ask(client, method, path).status_code == 404, operation
            continue
        status = ask(client, method, address(path)).status_code
        if may(DEVICE, allowed):
            assert status not in (401, 403), operation
            assert status < 500, operation
        else:
            assert status == 403, operation


@pytest.mark.parametrize("shown", ["no certificate", "an unknown certificate", "a revoked certificate"])
def test_through_the_devices_door_nobody_else_gets_anything(control: ControlApp, shown: str) -> None:
    serial = {"no certificate": None, "an unknown certificate": "abc"}.get(shown, "")
    if serial == "":
        serial = control.enrol("revoked")["serial"]
        control.client("operator").delete("/api/v1/devices/revoked")
    client = control.device_client(serial)
    client.headers["authorization"] = f"Bearer {control.token('admin')}"  # a token counts for nothing here
    for operation, allowed in MAY_CALL.items():
        method, path = operation.split(" ")
        if OPEN not in allowed:
            assert ask(client, method, address(path)).status_code == 401, operation


def test_a_devices_token_opens_nothing_at_the_peoples_door(control: ControlApp) -> None:
    client = control.client_with(control.enrol("tokened")["token"])
    for operation, allowed in MAY_CALL.items():
        method, path = operation.split(" ")
        if OPEN not in allowed:
            assert ask(client, method, address(path)).status_code == 403, operation


def test_a_revoked_token_opens_nothing(control: ControlApp) -> None:
    made = control.client("admin").post("/api/v1/tokens", json={"name": "gone", "role": "admin"}).json()
    client = control.client_with(made["token"])
    assert client.get("/api/v1/whoami").status_code == 200
    control.client("admin").delete(f"/api/v1/tokens/{made['token_id']}")
    for operation, allowed in MAY_CALL.items():
        method, path = operation.split(" ")
        if OPEN not in allowed:
            assert ask(client, method, address(path)).status_code == 401, operation


def test_every_page_wants_a_session(control: ControlApp) -> None:
    hidden = [(method, route.path) for route in routes_of(control) for method in sorted(route.methods)]
    assert len(hidden) > 10
    client = control.client()
    for method, path in hidden:
        answer = client.request(method, address(path))
        if path != "/login":
            assert answer.status_code == 303, (method, path)
            assert answer.headers["location"].startswith("/login"), (method, path)
        assert "default-src 'none'" in answer.headers["content-security-policy"], path
        assert answer.headers["x-content-type-options"] == "nosniff", path


def test_only_the_platforms_administrator_makes_tokens_that_serve_every_tenant(control: ControlApp) -> None:
    for role in (WORKER, GATEWAY):
        order = {"name": "x", "role": role}
        assert control.client("admin", "acme").post("/api/v1/tokens", json=order).status_code == 403
        assert control.client("admin").post("/api/v1/tokens", json=order).status_code == 201
    order = {"name": "x", "role": "viewer", "tenant": "globex"}
    assert control.client("admin", "acme").post("/api/v1/tokens", json=order).status_code == 403


def routes_of(control: ControlApp) -> list[BaseRoute]:
    """The routes that the OpenAPI document leaves out: pages."""
    found = [route for route in flatten(control.app.routes) if not getattr(route, "include_in_schema", True)]
    return [route for route in found if getattr(route, "methods", None) and not route.path.startswith("/api/")]


def flatten(routes: list[BaseRoute]) -> list[BaseRoute]:
    """Routes within included routers too."""
    flat: list[BaseRoute] = []
    for route in routes:
        nested = getattr(getattr(route, "original_router", None), "routes", None)
        flat += flatten(nested) if nested else [route]
    return flat


def test_figures_of_all_tenants_are_not_for_a_tenant(tmp_path: Path, control: ControlApp) -> None:
    from starlette.testclient import TestClient

    for tenant, status in (("acme", 403), ("default", 200)):
        headers = {"authorization": f"Bearer {control.token('viewer', tenant)}"}
        with_address = TestClient(control.app, headers=headers, client=("192.0.2.7", 1), raise_server_exceptions=False)
        assert with_address.get("/metrics").status_code == status
