"""Tokens against a real control-plane endpoint on loopback, and the gateway's independence from torch."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from cloud.gateway.auth import ControlPlaneTokens, FileTokens, read_bearer
from cloud.gateway.decisions import DecisionLog
from wire.decision import Candidate, Decision, decide
from wire.errors import ForeshoreError, NotAllowedError, NotAuthenticatedError, NotFoundError, UnavailableError


class ControlPlane(ThreadingHTTPServer):
    """Answers introspection and takes decisions, like the real one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.decisions: list[Any] = []
        self.is_broken = False


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        control: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if control.is_broken or self.headers["authorization"] != "Bearer gateway":
            self.send_response(503 if control.is_broken else 401)
            self.end_headers()
            return
        if self.path == "/api/v1/decisions":
            control.decisions.extend(body["records"])
            answer: Any = {}
        else:
            control.asked.append(body["token"])
            role = {"dev": "device", "view": "viewer"}.get(body["token"])
            answer = {"active": role is not None, "tenant": "acme", "subject": "s", "role": role}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def control() -> Iterator[ControlPlane]:
    with ControlPlane() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def client_of(control: ControlPlane) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{control.server_port}", headers={"authorization": "Bearer gateway"}
    )


def test_answers_are_remembered_for_thirty_seconds_and_roles_are_checked(control: ControlPlane) -> None:
    async def run() -> None:
        now = [0.0]
        async with client_of(control) as client:
            auth = ControlPlaneTokens(client, clock=lambda: now[0])
            assert (await auth.authenticate("dev")).tenant == "acme"
            await auth.authenticate("dev")
            assert control.asked == ["dev"]
            with pytest.raises(NotAllowedError, match="viewer"):
                await auth.authenticate("view")
            with pytest.raises(NotAuthenticatedError):
                await auth.authenticate("nobody")
            control.is_broken = True
            await auth.authenticate("dev")
            now[0] = 31.0
            with pytest.raises(UnavailableError):
                await auth.authenticate("dev")

    asyncio.run(run())


def test_two_tenants_have_different_salts(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("# comment\nsecret\n")

    async def run() -> None:
        one = await FileTokens(tmp_path / "t", "one").authenticate("secret")
        two = await FileTokens(tmp_path / "t", "two").authenticate("secret")
        assert one.salt != two.salt
        with pytest.raises(NotAuthenticatedError):
            await FileTokens(tmp_path / "t").authenticate("# comment")

    asyncio.run(run())


@pytest.mark.parametrize("header", [None, "", "Basic abc", "Bearer", "Bearer  ", "Bearer " + "x" * 5000])
def test_anything_but_a_bearer_token_is_refused(header: str | None) -> None:
    with pytest.raises(NotAuthenticatedError):
        read_bearer(header)


def make_decision(name: str) -> Decision:
    return decide(
        decision_id=name,
        kind="route",
        policy="route/1",
        config={},
        decided_at="2026-01-01T00:00:00+00:00",
        inputs={},
        candidates=[Candidate("w", {"x": 1.0})],
        weights={},
    )


def test_decisions_are_kept_per_tenant_and_sent_once_the_control_plane_is_back(control: ControlPlane) -> None:
    async def run() -> None:
        async with client_of(control) as client:
            log = DecisionLog(client)
            control.is_broken = True
            log.finish("acme", make_decision("d1"))
            log.finish("acme", make_decision("d2"))
            assert not await log.send_batch()
            control.is_broken = False
            assert await log.send_batch()
            assert [d["decision_id"] for d in control.decisions] == ["d1", "d2"]
            assert log.get("acme", "d1")["chosen"] == "w"
            with pytest.raises(NotFoundError):
                log.get("another", "d1")

    asyncio.run(run())


def test_the_gateway_and_the_router_import_no_torch() -> None:
    code = "import sys, cloud.gateway.cli, cloud.serving.router; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_every_error_names_a_remedy() -> None:
    with pytest.raises(ForeshoreError) as caught:
        read_bearer(None)
    assert caught.value.remedy
