"""The control plane's own MQTT clients: one for control topics, one for bulk content.

Callbacks of the network thread only parse and queue; a worker thread does what takes time. The broker is a cache: after
every connection the retained epoch is compared with our own, and when it is missing or another's, everything retained
is published again. The bulk client never has more than `WINDOW` chunks on their way to the broker.
"""

from __future__ import annotations

import logging
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from wire import topics
from wire.errors import ForeshoreError, UnavailableError
from wire.messages import Epoch, parse

KEEPALIVE_S = 20
EPOCH_WAIT_S = 1.0
WINDOW = 20
PUBLISH_TIMEOUT_S = 10.0
CUT_TIMEOUT_S = 5.0
MAX_INBOX = 10_000
LEAVES = ("reported", "status", "need", "event")

log = logging.getLogger(__name__)

Hear = Callable[[str, str, str, bytes], None]
"""Tenant, device, leaf, payload."""


class Link:
    """Connection to the broker; `hear` runs on one worker thread, in order of arrival."""

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext | None, *, epoch: int, hear: Hear,
        republish: Callable[[], object],
    ) -> None:  # fmt: skip
        self.is_connected = False
        self.num_refused = 0
        self._host, self._port, self._context = host, port, context
        self._epoch = Epoch(epoch=epoch, started_at=datetime.now(UTC))
        self._hear, self._republish = hear, republish
        self._inbox: queue.Queue[tuple[str, bytes] | None] = queue.Queue(MAX_INBOX)
        self._seen_epoch: int | None = None
        self._epoch_arrived = threading.Event()
        self._connections = threading.Semaphore(0)
        self._is_stopping = threading.Event()
        self._window = threading.BoundedSemaphore(WINDOW)
        self._control = _client("foreshore-control", context)
        self._bulk = _client("foreshore-control.bulk", context)
        self._control.on_connect = self._on_connect
        self._control.on_disconnect = self._on_disconnect
        self._control.on_message = self._on_message
        self._bulk.on_publish = self._on_bulk_publish
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to connect; returns at once and keeps trying."""
        for client in (self._control, self._bulk):
            client.connect_async(self._host, self._port, KEEPALIVE_S, clean_start=True)
            client.loop_start()
        for name, target in (("link-inbox", self._work), ("link-epoch", self._keep_epoch)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Disconnect and end the threads."""
        self._is_stopping.set()
        self._connections.release()
        self._inbox.put(None)
        for client in (self._control, self._bulk):
            client.disconnect()
            client.loop_stop()
        for thread in self._threads:
            thread.join(5.0)

    def send_desired(self, tenant: str, device_id: str, envelope: bytes) -> None:
        """Put a device's retained document on the broker; while it is away nothing is queued, it is republished."""
        if self.is_connected:
            self._control.publish(topics.device(tenant, device_id, "desired"), envelope, qos=1, retain=True)

    def clear_retained(self, tenant: str, device_id: str) -> None:
        """Take a revoked device's retained documents off the broker."""
        for leaf in ("desired", "reported", "status"):
            self._control.publish(topics.device(tenant, device_id, leaf), b"", qos=1, retain=True)

    def cut_off(self, client_ids: Iterable[str]) -> None:
        """End these clients' connections and sessions, by taking them over (MQTT 5, 3.1.4) and letting them go."""
        for client_id in client_ids:
            try:
                _take_over(_client(client_id, self._context), self._host, self._port)
            except OSError as error:  # no broker, no connection: it will refuse them when it is back
                log.warning("%s could not be cut off now: %s", client_id.rpartition("-")[0], error)

    def send_command(self, tenant: str, device_id: str, name: str, payload: bytes) -> None:
        """Send one command."""
        self._control.publish(topics.device(tenant, device_id, f"cmd/{name}"), payload, qos=1)

    def send_bulk(self, topic: str, payload: bytes) -> None:
        """Publish content, waiting while the window is full. Raises `UnavailableError` when the broker is away."""
        if not self._bulk.is_connected() or not self._window.acquire(timeout=PUBLISH_TIMEOUT_S):
            raise UnavailableError("the broker takes no content now", remedy="the device will ask again")
        info = self._bulk.publish(topic, payload, qos=1)
        if info.rc not in (mqtt.MQTT_ERR_SUCCESS, mqtt.MQTT_ERR_NO_CONN):
            self._release()
            raise UnavailableError(f"the broker refused content: {mqtt.error_string(info.rc)}", remedy="ask again")

    def _on_bulk_publish(self, *_: Any) -> None:
        self._release()

    def _release(self) -> None:
        try:
            self._window.release()
        except ValueError:
            log.debug("an acknowledgement of an earlier connection")

    def _on_connect(self, client: mqtt.Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("the broker refused the control plane: %s", reason)
            return
        self._seen_epoch = None
        self._epoch_arrived.clear()
        self.is_connected = True
        client.subscribe([(topics.all_devices(leaf), mqtt.SubscribeOptions(qos=1)) for leaf in LEAVES])
        client.subscribe([(topics.EPOCH, mqtt.SubscribeOptions(qos=1))])
        self._connections.release()

    def _on_disconnect(self, *_: Any) -> None:
        self.is_connected = False

    def _on_message(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        if message.topic == topics.EPOCH:
            try:
                self._seen_epoch = parse(Epoch, message.payload).epoch
            except ForeshoreError:
                self._seen_epoch = None
            self._epoch_arrived.set()
            return
        try:
            self._inbox.put_nowait((message.topic, message.payload))
        except queue.Full:
            self.num_refused += 1  # devices repeat what matters: reports on reconnect, needs and events until answered

    def _keep_epoch(self) -> None:
        while not self._is_stopping.is_set():
            if not self._connections.acquire(timeout=1.0) or self._is_stopping.is_set():
                continue
            self._epoch_arrived.wait(EPOCH_WAIT_S)
            if self._seen_epoch == self._epoch.epoch:
                continue
            try:
                self._republish()
            except ForeshoreError as error:
                log.warning("publishing everything again failed: %s", error)
                self._is_stopping.wait(1.0)
                self._connections.release()
                continue
            self._control.publish(topics.EPOCH, self._epoch.to_bytes(), qos=1, retain=True)

    def _work(self) -> None:
        while (item := self._inbox.get()) is not None:
            topic, payload = item
            try:
                parsed = topics.parse_device(topic)
                if payload:
                    self._hear(parsed.tenant, parsed.device_id, parsed.leaf, payload)
            except ForeshoreError as error:
                log.warning("message on %s was refused: %s", topic, error)
            except Exception:
                log.exception("message on %s could not be handled", topic)


def _client(name: str, context: ssl.SSLContext | None) -> mqtt.Client:
    client = mqtt.Client(CallbackAPIVersion.VERSION2, name, protocol=mqtt.MQTTv5)
    client.max_inflight_messages_set(WINDOW)
    client.max_queued_messages_set(0)
    client.reconnect_delay_set(1, 10)
    if context is not None:
        client.tls_set_context(context)
    client.connect_timeout = 5.0
    return client


def _take_over(client: mqtt.Client, host: str, port: int) -> None:
    is_taken = threading.Event()
    client.on_connect = lambda *_: is_taken.set()
    client.connect(host, port, KEEPALIVE_S, clean_start=True)
    deadline = time.monotonic() + CUT_TIMEOUT_S
    while not is_taken.is_set() and time.monotonic() < deadline:
        client.loop(0.05)
    client.disconnect()


def wait_connected(link: Link, timeout_s: float) -> bool:
    """Whether the link came up in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not link.is_connected:
        time.sleep(0.02)
    return link.is_connected
