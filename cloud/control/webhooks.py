"""Webhooks: addresses that are told of changes, signed, at least once, in the order of the changes where all goes well.

The queue is in the database (`webhook_queue`); a sender thread takes what is due. A delivery counts when the address
answers 2xx; anything else is tried again, later each time with jitter, up to `MAX_ATTEMPTS`, then it is given up and a
person can send it again. Signed as Standard Webhooks says (standardwebhooks.com): headers `webhook-id` (the same in
each attempt: the receiver's key against repeats), `webhook-timestamp`, `webhook-signature` = `v1,` + base64 of
HMAC-SHA256 over `id.timestamp.body`. A redirect is a failure and the answer's body is not read.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import random
import re
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control import audit, webhook_queue
from cloud.control.database import Database
from cloud.control.identity import Principal, new_id
from cloud.control.tables import Webhook, WebhookDelivery
from wire.errors import ConflictError, ForeshoreError, InvalidInputError, NotFoundError

MAX_ATTEMPTS = 16
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 3600.0
TIMEOUT_S = 10.0
IDLE_S = 0.5
NUM_SENDERS = 4
MAX_WEBHOOKS = 50
KEEP_DAYS = 30
SECRET_PREFIX = "whsec_"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_PATTERN = re.compile(r"[a-z_*]+(\.[a-z_*]+)?")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One delivery as a sender thread needs it."""

    delivery_id: str
    url: str
    secret: str
    body: str
    num_before: int


class Webhooks:
    """Manages webhooks, and sends what is queued while it runs."""

    def __init__(self, database: Database, *, first_retry_s: float = FIRST_RETRY_S) -> None:
        self._database = database
        self._first_retry_s = first_retry_s
        self._random = random.Random()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._pool = ThreadPoolExecutor(NUM_SENDERS, thread_name_prefix="webhook")

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is not delivered yet stays queued."""
        self._is_stopping.set()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_S + 5)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # what people ask

    def create(self, by: Principal, url: str, actions: Sequence[str]) -> dict[str, Any]:
        """Make a webhook; its secret is in this answer and never shown again."""
        check_url(url)
        if not actions or any(not _PATTERN.fullmatch(one) for one in actions):
            raise InvalidInputError(f"actions {list(actions)[:5]} are not understood", remedy='such as ["rollout.*"]')
        with self._database.write() as session:
            own = list(session.scalars(select(Webhook.webhook_id).where(Webhook.tenant == by.tenant)))
            if len(own) >= MAX_WEBHOOKS:
                raise ConflictError(f"there are {len(own)} webhooks", remedy="delete one first")
            hook = Webhook(
                webhook_id=new_id("hook"), tenant=by.tenant, url=url, actions=sorted(set(actions)),
                secret=SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode(),
                created_by=by.subject, created_at=datetime.now(UTC),
            )  # fmt: skip
            session.add(hook)
            session.flush()
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="webhook.create", subject=hook.webhook_id,
                details={"url": url, "actions": hook.actions},
            )  # fmt: skip
            return {**_shown(hook, None), "secret": hook.secret}

    def delete(self, by: Principal, webhook_id: str) -> None:
        """Forget a webhook with what it still had to be told."""
        with self._database.write() as session:
            hook = _get(session, by.tenant, webhook_id)
            session.delete(hook)
            for delivery in session.scalars(select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)):
                session.delete(delivery)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="webhook.delete", subject=webhook_id,
                details={"url": hook.url},
            )  # fmt: skip

    def ping(self, by: Principal, webhook_id: str) -> dict[str, Any]:
        """Queue a message that says nothing, to try the address."""
        with self._database.write() as session:
            delivery = webhook_queue.new_delivery(_get(session, by.tenant, webhook_id), "ping", {"type": "ping"})
            session.add(delivery)
            session.flush()
            audit.record(session, tenant=by.tenant, actor=by.subject, action="webhook.ping", subject=webhook_id)
            return _delivery(delivery)

    def resend(self, by: Principal, delivery_id: str) -> dict[str, Any]:
        """Queue a delivery again from the beginning."""
        with self._database.write() as session:
            delivery = session.get(WebhookDelivery, delivery_id)
            if delivery is None or delivery.tenant != by.tenant:
                raise NotFoundError(f"delivery {delivery_id!r} does not exist", remedy="list the webhook's deliveries")
            delivery.state, delivery.attempts, delivery.finished_at = "pending", 0, None
            delivery.due_at = datetime.now(UTC)
            audit.record(
                session, tenant=by.tenant, actor=by.subject, action="webhook.resend", subject=delivery.webhook_id,
                details={"delivery": delivery_id},
            )  # fmt: skip
            return _delivery(delivery)

    def all(self, tenant: str) -> list[dict[str, Any]]:
        """The webhooks, each with its newest delivery; no secrets."""
        query = select(Webhook).where(Webhook.tenant == tenant).order_by(Webhook.created_at)
        with self._database.read() as session:
            return [_shown(hook, _newest(session, hook.webhook_id)) for hook in session.scalars(query)]

    def deliveries(self, tenant: str, webhook_id: str, *, limit: int, offset: int) -> list[dict[str, Any]]:
        """What a webhook was told or has to be told, newest first."""
        with self._database.read() as session:
            _get(session, tenant, webhook_id)
            query = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
            query = query.order_by(WebhookDelivery.created_at.desc()).limit(limit).offset(offset)
            return [_delivery(one) for one in session.scalars(query)]

    # sending

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            try:
                is_busy = self.send_due()
            except ForeshoreError as error:
                log.warning("webhooks: %s", error)
                is_busy = False
            except Exception:
                log.exception("webhooks: sending failed")
                is_busy = False
            if not is_busy:
                self._is_stopping.wait(IDLE_S)

    def send_due(self) -> bool:
        """Make one attempt for each webhook whose oldest delivery is due; whether there was any."""
        attempts = self._due()
        for attempt, answer in zip(attempts, self._pool.map(send, attempts), strict=True):
            self._settle(attempt, answer)
        return bool(attempts)

    def _due(self) -> list[Attempt]:
        """The oldest unfinished delivery of each webhook, where it is due; while it waits, those behind it wait too."""
        now, due = datetime.now(UTC), list[Attempt]()
        with self._database.read() as session:
            for hook in session.scalars(select(Webhook)):
                query = select(WebhookDelivery).where(
                    WebhookDelivery.webhook_id == hook.webhook_id, WebhookDelivery.state == "pending"
                )
                one = session.scalars(query.order_by(WebhookDelivery.created_at).limit(1)).first()
                if one is not None and one.due_at <= now:
                    due.append(Attempt(one.delivery_id, hook.url, hook.secret, one.body, one.attempts))
        return due

    def _settle(self, attempt: Attempt, answer: str) -> None:
        with self._database.write() as session:
            delivery = session.get(WebhookDelivery, attempt.delivery_id)
            if delivery is None:
                return
            delivery.attempts, delivery.answer = attempt.num_before + 1, answer[:300]
            now = datetime.now(UTC)
            if answer.startswith("2"):
                delivery.state, delivery.finished_at = "delivered", now
            elif delivery.attempts >= MAX_ATTEMPTS:
                delivery.state, delivery.finished_at = "given_up", now
            else:
                delivery.due_at = now + timedelta(seconds=self._retry_after_s(delivery.attempts))
            old = (
                select(WebhookDelivery)
                .where(WebhookDelivery.webhook_id == delivery.webhook_id)
                .where(WebhookDelivery.finished_at < now - timedelta(days=KEEP_DAYS))
            )
            for one in session.scalars(old.limit(100)):
                session.delete(one)

    def _retry_after_s(self, num_attempts: int) -> float:
        longest = min(self._first_retry_s * 2.0 ** (num_attempts - 1), MAX_RETRY_S)
        return float(longest * self._random.uniform(0.5, 1.0))


def send(attempt: Attempt) -> str:
    """Make one attempt; the status and reason, or what went wrong."""
    now = int(time.time())
    body = attempt.body.encode()
    headers = {
        "content-type": "application/json",
        "user-agent": "foreshore-webhooks/1",
        "webhook-id": attempt.delivery_id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign(attempt.secret, attempt.delivery_id, now, body),
    }
    try:
        with (
            httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client,
            client.stream("POST", attempt.url, content=body, headers=headers) as answer,
        ):
            return f"{answer.status_code} {answer.reason_phrase}".strip()
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return f"no answer: {type(error).__name__}: {error}"


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def check_url(url: str) -> None:
    """Refuse what is no address for a webhook: https, or http on this machine; no user name, no fragment."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InvalidInputError(f"{url[:100]!r} is no address", remedy="https://host/path") from error
    is_local = parts.scheme == "http" and parts.hostname in LOOPBACK
    if not (parts.scheme == "https" or is_local) or not parts.hostname or parts.username or parts.fragment:
        raise InvalidInputError(
            f"{url[:100]!r} is no address for a webhook", remedy="https://host/path (http only on this machine)"
        )
    if len(url) > 2000 or not url.isprintable() or " " in url:
        raise InvalidInputError("the address is too long or not printable", remedy="at most 2000 characters")


def _get(session: Session, tenant: str, webhook_id: str) -> Webhook:
    hook = session.get(Webhook, webhook_id)
    if hook is None or hook.tenant != tenant:
        raise NotFoundError(f"webhook {webhook_id!r} does not exist", remedy="see: foreshore webhooks")
    return hook


def _newest(session: Session, webhook_id: str) -> WebhookDelivery | None:
    query = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
    return session.scalars(query.order_by(WebhookDelivery.created_at.desc()).limit(1)).first()


def _shown(hook: Webhook, newest: WebhookDelivery | None) -> dict[str, Any]:
    return {
        "webhook_id": hook.webhook_id,
        "url": hook.url,
        "actions": hook.actions,
        "created_by": hook.created_by,
        "created_at": hook.created_at.isoformat(),
        "newest_delivery": _delivery(newest) if newest else None,
    }


def _delivery(delivery: WebhookDelivery) -> dict[str, Any]:
    return {
        "delivery_id": delivery.delivery_id,
        "action": delivery.action,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "answer": delivery.answer,
        "created_at": delivery.created_at.isoformat(),
        "due_at": delivery.due_at.isoformat() if delivery.state == "pending" else None,
        "finished_at": delivery.finished_at.isoformat() if delivery.finished_at else None,
    }
