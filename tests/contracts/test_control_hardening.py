"""What nobody should send, sent: the control plane says no in order, stays up, and keeps its secrets to itself."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
import uvicorn
from fastapi import Body, FastAPI
from starlette.applications import Starlette
from starlette.types import Message
from typer.testing import CliRunner

from cloud.control.api.base import install_errors
from cloud.control.api.shield import MAX_BODY_BYTES, Shield
from cloud.control.cli import app as cloud_command
from cloud.control.listeners import MAX_HEADER_BYTES, Door
from cloud.gateway.cli import app as gateway_command
from edge_agent.commands import app as agent_command
from tests.fakes.control import ControlProcess, FakeDevice, wait_until
from wire.errors import InvalidInputError

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path_factory.mktemp("hardening"))
    process.start()
    yield process
    assert process.stop() == 0


def pieces(count: int) -> Iterator[bytes]:
    """A body whose size nobody declared."""
    for _ in range(count):
        yield b" " * 65536


BODIES: dict[str, tuple[Callable[[], Any], dict[str, str], set[int]]] = {
    "too large, and says so": (lambda: b" " * (MAX_BODY_BYTES + 1), JSON, {413}),
    "too large, in pieces": (lambda: pieces(40), JSON, {413}),
    "nested 100,000 deep": (lambda: b"[" * 100_000 + b"]" * 100_000, JSON, {400, 422}),
    "nested objects": (lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000, JSON, {400, 422}),
    "not UTF-8": (lambda: b'{"device_id": "\xff\xfe"}', JSON, {400, 422}),
    "a lone surrogate": (lambda: b'{"device_id": "\\ud800"}', JSON, {422}),
    "a zero byte": (lambda: b'{"device_id": "a\\u0000b"}', JSON, {422}),
    "cut off": (lambda: b'{"device_id": "a', JSON, {422}),
    "another type": (lambda: b"<device/>", {"content-type": "text/xml"}, {415, 422}),
    "a form": (lambda: b"device_id=a", {"content-type": "application/x-www-form-urlencoded"}, {415, 422}),
    "no type": (lambda: b'{"device_id": "fine"}', {"content-type": ""}, {415, 422}),
    "a number as large as a book": (
        lambda: b'{"device_id": "a", "expires_s": ' + b"9" * 100_000 + b"}",
        JSON,
        {400, 422},
    ),
    "not a number": (lambda: b'{"device_id": "a", "expires_s": NaN}', JSON, {422}),
    "an unknown field": (lambda: b'{"device_id": "a", "role": "admin"}', JSON, {422}),
    "gzip": (lambda: b"\x1f\x8b\x08", {**JSON, "content-encoding": "gzip"}, {400, 415, 422}),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_refused_with_problem_details(control: ControlProcess, name: str) -> None:
    make, headers, expected = BODIES[name]
    headers = {"authorization": f"Bearer {control.token()}", **headers}
    answer = httpx.post(f"{control.url}/api/v1/enrolments", content=make(), headers=headers, timeout=20)
    assert answer.status_code in expected, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * (2 * MAX_HEADER_BYTES) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x-many: a\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * (2 * MAX_HEADER_BYTES) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /api/v1/enrol HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /api/v1/enrol HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /api/v1/enrol HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\nZZ\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /%00%ff%zz/../../etc/passwd HTTP/1.1\r\nhost: x\r\nauthorization: Bearer \xff\xfe\r\n\r\n",
    ],
    ids=["long header", "many headers", "long path", "nonsense", "no host", "two lengths", "negative length",
         "bad chunk", "TLS on the plain port", "odd path and token"],
)  # fmt: skip
def test_a_request_that_is_no_http_is_answered_with_4xx_or_hung_up_on(
    control: ControlProcess, request_bytes: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", control.port), timeout=20) as connection:
        try:
            connection.sendall(request_bytes)
            answer = connection.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert answer == b"" or re.match(rb"HTTP/1.1 (4\d\d|303) ", answer), answer[:100]
    assert httpx.get(f"{control.url}/healthz").json()["status"] == "ok"


def test_a_body_that_trickles_is_given_up() -> None:
    app, sent = FastAPI(), list[Message]()
    install_errors(app)

    @app.post("/api/x")
    async def size(body: Annotated[dict[str, int], Body()]) -> int:
        return len(body)

    shielded = Shield(app, body_timeout_s=0.2)

    async def trickle() -> Message:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/x", "headers": headers, "scheme": "http"}
    asyncio.run(shielded({**scope, "query_string": b""}, trickle, send))
    assert sent[0]["status"] == 408


def test_headers_that_trickle_are_given_up() -> None:
    class Impatient(Door):
        header_timeout_s = 0.3

    config = uvicorn.Config(Starlette(), http=Impatient, ws="none", lifespan="off", log_level="critical")
    server, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        wait_until(lambda: server.started, "the server starts")
        with socket.create_connection(listener.getsockname(), timeout=20) as trickling:
            trickling.sendall(b"GET / HTTP/1.1\r\nhost: ")
            assert trickling.recv(10) == b""  # hung up
        with socket.create_connection(listener.getsockname(), timeout=20) as silent:
            assert silent.recv(10) == b""
        with httpx.Client() as calm:  # a connection that is kept for the next request is not given up
            assert calm.get(f"http://127.0.0.1:{listener.getsockname()[1]}/").status_code == 404
            time.sleep(0.6)
            assert calm.get(f"http://127.0.0.1:{listener.getsockname()[1]}/").status_code == 404
    finally:
        server.should_exit = True
        thread.join(20)


def test_trying_tokens_is_slow_and_those_who_are_known_do_not_notice(control: ControlProcess) -> None:
    assert control.call("GET", "/whoami").status_code == 200
    answers = [control.call("GET", "/whoami", token=f"guess-{number}") for number in range(30)]
    assert [answer.status_code for answer in answers].count(401) == 20
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) > 0
    body = {"enrolment_token": "fe_guess", "csr_pem": "x"}
    assert control.call("POST", "/enrol", body, token=None).status_code == 429
    assert control.call("GET", "/whoami").status_code == 200


def test_nothing_secret_is_readable_by_others_logged_or_on_a_command_line(tmp_path: Path) -> None:
    control = ControlProcess(tmp_path / "home")
    control.start()
    try:
        device = FakeDevice(control, "secretive")
        device.connect()
        made = control.ok("POST", "/tokens", {"name": "x", "role": "viewer"})["token"]
        control.call("POST", "/enrol", {"enrolment_token": "fe_wrong", "csr_pem": "x"}, token=None)
        control.call("GET", "/whoami", token=made + "x")
        secrets = [made, device.identity["device_token"], *map(control.token, ("admin", "worker", "gateway"))]
        secrets += [file.read_text().splitlines()[1] for file in (control.home / "pki").glob("*.key")]
        secrets += [file.read_text().splitlines()[1] for file in (control.home / "keys").rglob("*.pem")]
        for secret in secrets:
            for log in [control.home / "log", control.home / "mosquitto" / "mosquitto.log"]:
                assert secret not in log.read_text()
            assert secret not in command_lines()
            assert secret.encode() not in (control.home / "control.db").read_bytes()
        device.close()
    finally:
        assert control.stop() == 0
    public = {"ca.pem", "server.pem", "control.pem", "ports.json", "port.json", "log"}
    ours = [
        file for file in control.home.rglob("*") if not {"devices", "trust"} & set(file.parts)
    ]  # metadata is public
    for file in ours:
        if file.is_file() and (file.name not in public or file.parent.name == "keys"):
            assert file.stat().st_mode & 0o077 == 0, file


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--host", "0.0.0.0"], "without TLS"),
        (["--host", "192.0.2.1", "--tls-key", "k"], "without TLS"),
        (["--host", "fleet.example.org"], "without TLS"),
        (["--tls-cert", "c"], "--tls-cert and --tls-key"),
    ],
)
def test_people_are_not_served_in_the_open(tmp_path: Path, options: list[str], complaint: str) -> None:
    result = CliRunner().invoke(cloud_command, ["--home", str(tmp_path / "home"), *options])
    assert isinstance(result.exception, InvalidInputError)
    assert complaint in str(result.exception)
    assert not (tmp_path / "home").exists()


def test_applications_are_not_served_in_the_open(tmp_path: Path) -> None:
    options = ["--worker", "w=both@127.0.0.1:1", "--model-name", "m", "--tokenizer", str(tmp_path), "--host", "0.0.0.0"]
    result = CliRunner().invoke(gateway_command, options)
    assert isinstance(result.exception, InvalidInputError)
    assert "without TLS" in str(result.exception)


def test_the_agents_local_api_stays_on_its_machine(tmp_path: Path) -> None:
    result = CliRunner().invoke(agent_command, ["run", "--home", str(tmp_path / "home"), "--host", "0.0.0.0"])
    assert isinstance(result.exception, InvalidInputError)
    assert "asks nobody who they are" in str(result.exception)


def test_people_reach_it_over_tls_when_it_has_a_certificate(tmp_path: Path) -> None:
    from cloud.control.authority import Authority

    other = Authority(tmp_path / "pki")
    certificate, key = other.ensure_server(["127.0.0.1"])
    control = ControlProcess(tmp_path / "home")
    control.options = ["--tls-cert", str(certificate), "--tls-key", str(key)]
    control.url, control.ca_file = f"https://127.0.0.1:{control.port}", str(other.ca_file)
    control.start()
    try:
        context = ssl.create_default_context(cafile=str(other.ca_file))
        answer = httpx.get(f"https://127.0.0.1:{control.port}/login", verify=context)
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"]
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{control.port}/login")
    finally:
        assert control.stop() == 0


def test_the_docs_page_runs_no_foreign_code(control: ControlProcess) -> None:
    answer = httpx.get(f"{control.url}/api/docs")
    assert answer.status_code == 200
    assert "/api/v1/rollouts" in answer.text
    assert "<script" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert json.loads(httpx.get(f"{control.url}/api/openapi.json").text)["paths"]


def command_lines() -> str:
    """What everyone on this machine may read of every process."""
    lines = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                lines.append((process / "cmdline").read_text(errors="replace"))
            except OSError:
                continue
    return "\n".join(lines)
