"""Webhooks against a real receiver: signed, repeated until taken, in order, and not lost when the sender dies."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cloud.control import audit
from cloud.control.database import Database
from cloud.control.events import EventBus
from cloud.control.identity import SYSTEM
from cloud.control.webhooks import MAX_ATTEMPTS, Webhooks, check_url
from tests.fakes.control import wait_until
from wire.errors import InvalidInputError, NotFoundError

TENANT = SYSTEM.tenant


class Receiver:
    """Takes messages; `answers` are the statuses to give before 204s begin."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.messages: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.messages.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
                self.send_header("content-length", "0")
                self.send_header("location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.messages]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'c.db'}", EventBus())
    database.upgrade()
    yield database
    database.dispose()


@pytest.fixture
def webhooks(database: Database) -> Iterator[Webhooks]:
    webhooks = Webhooks(database, first_retry_s=0.01)
    yield webhooks
    webhooks.stop()


def change(database: Database, action: str, subject: str) -> None:
    with database.write() as session:
        audit.record(session, tenant=TENANT, actor="anna", action=action, subject=subject)


def test_a_message_is_signed_over_id_time_and_body(database: Database, webhooks: Webhooks, receiver: Receiver) -> None:
    made = webhooks.create(SYSTEM, receiver.url, ["rollout.*"])
    change(database, "rollout.halted", "rol-1")
    change(database, "group.put", "docks")
    assert webhooks.send_due()
    assert not webhooks.send_due()
    ((headers, body),) = receiver.messages
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(made["secret"].removeprefix("whsec_"))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert json.loads(body)["entry"]["subject"] == "rol-1"
    assert "secret" not in webhooks.all(TENANT)[0]


def test_what_is_not_taken_is_sent_again_later_under_the_same_id_and_keeps_its_place(
    database: Database, webhooks: Webhooks, receiver: Receiver
) -> None:
    receiver.answers = [500, 302, 429]
    made = webhooks.create(SYSTEM, receiver.url, ["rollout.*"])
    change(database, "rollout.running", "first")
    change(database, "rollout.halted", "second")
    webhooks.start()
    wait_until(lambda: len(receiver.messages) == 5, "all attempts")
    assert [body["entry"]["subject"] for body in receiver.bodies()] == ["first"] * 4 + ["second"]
    assert len({headers["webhook-id"] for headers, _ in receiver.messages[:4]}) == 1

    def states() -> list[tuple[str, int]]:
        return [(d["state"], d["attempts"]) for d in webhooks.deliveries(TENANT, made["webhook_id"], limit=9, offset=0)]

    wait_until(lambda: states() == [("delivered", 1), ("delivered", 4)], "both are delivered")


def test_a_change_that_was_committed_is_told_by_the_next_process(database: Database, receiver: Receiver) -> None:
    first = Webhooks(database)
    first.create(SYSTEM, receiver.url, ["rollout.*"])
    change(database, "rollout.create", "rol-1")
    first.stop()  # nothing was sent
    second = Webhooks(database)
    second.send_due()
    second.stop()
    assert [body["type"] for body in receiver.bodies()] == ["rollout.create"]


def test_an_address_that_never_answers_is_given_up_and_can_be_tried_again(
    database: Database, webhooks: Webhooks, receiver: Receiver
) -> None:
    receiver.answers = [503] * MAX_ATTEMPTS
    made = webhooks.create(SYSTEM, receiver.url, ["rollout.*"])
    webhooks.ping(SYSTEM, made["webhook_id"])
    fast = Webhooks(database, first_retry_s=0.0)
    for _ in range(MAX_ATTEMPTS):
        assert fast.send_due()
    assert not fast.send_due()
    (delivery,) = fast.deliveries(TENANT, made["webhook_id"], limit=9, offset=0)
    assert (delivery["state"], delivery["answer"]) == ("given_up", "503 Service Unavailable")
    fast.resend(SYSTEM, delivery["delivery_id"])
    assert fast.send_due()
    assert fast.deliveries(TENANT, made["webhook_id"], limit=9, offset=0)[0]["state"] == "delivered"
    fast.stop()


def test_a_dead_address_does_not_keep_another_waiting(
    database: Database, webhooks: Webhooks, receiver: Receiver
) -> None:
    webhooks.create(SYSTEM, "http://127.0.0.1:9/nobody", ["*"])
    webhooks.create(SYSTEM, receiver.url, ["group.*"])
    change(database, "group.put", "docks")
    webhooks.send_due()
    assert [body["type"] for body in receiver.bodies()] == ["group.put"]


def test_a_webhook_belongs_to_its_tenant(database: Database, webhooks: Webhooks, receiver: Receiver) -> None:
    made = webhooks.create(SYSTEM, receiver.url, ["group.*"])
    with database.write() as session:
        audit.record(session, tenant="other", actor="bert", action="group.put", subject="x")
    assert not webhooks.send_due()
    with pytest.raises(NotFoundError):
        webhooks.deliveries("other", made["webhook_id"], limit=1, offset=0)


@pytest.mark.parametrize(
    "url",
    ["http://example.com/x", "ftp://127.0.0.1/x", "https://u:p@host/", "https://", "x", "https://h/ a", "https://[x"],
)
def test_an_address_that_is_not_safe_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError):
        check_url(url)
