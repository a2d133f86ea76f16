"""The device's two MQTT connections: control (persistent session) and bulk (clean, only while something is fetched).

MQTT 5, mutual TLS, QoS 1. Bulk messages are acknowledged by hand, after the chunk is durable: with a receive maximum
of 8 that is real backpressure. Reconnecting waits a random time between 0 and `reconnect_max_s` (full jitter).
paho runs in its own thread; callbacks are handed to the event loop.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

CONNECT_TIMEOUT_S = 10.0
SESSION_EXPIRY_S = 24 * 3600
MAX_QUEUED = 1000


@dataclass(frozen=True)
class Will:
    """What the broker says for us when we are gone."""

    topic: str
    payload: bytes
    delay_s: int = 10


@dataclass(frozen=True)
class Endpoint:
    """Broker and credentials; without TLS the connection is plain (only for tests on loopback)."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None


Receive = Callable[[str, bytes, Callable[[], None]], None]
"""Called in the event loop with topic, payload and the acknowledgement to call once the message is dealt with."""


class Connection:
    """One MQTT connection that keeps coming back until `close`."""

    def __init__(
        self,
        endpoint: Endpoint,
        client_id: str,
        *,
        receive: Receive,
        connected: Callable[[bool], None],
        persistent: bool,
        receive_maximum: int,
        reconnect_max_s: float,
        will: Will | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._receive = receive
        self._connected = connected
        self._persistent = persistent
        self._receive_maximum = receive_maximum
        self._reconnect_max_s = reconnect_max_s
        self._topics: set[str] = set()
        self._stopping = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._client = self._make_client(client_id, will)
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)
        self.is_connected = False
        self.ready = asyncio.Event()

    def start(self) -> None:
        """Begin connecting, in the background."""
        self._thread.start()

    def subscribe(self, *topics: str) -> None:
        """Want these topics, now and after each reconnect."""
        self._topics.update(topics)
        if self.is_connected:
            self._client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Send with QoS 1; False when there is no connection (the caller says it again after the next one)."""
        if not self.is_connected:
            return False
        return self._client.publish(topic, payload, qos=1, retain=retain).rc == mqtt.MQTT_ERR_SUCCESS

    def reconnect(self) -> None:
        """Leave and come back, with the certificate in use now; a persistent session loses nothing."""
        self._client.disconnect()

    async def close(self) -> None:
        """Disconnect and end the thread."""
        self._stopping.set()
        self._client.disconnect()
        await asyncio.to_thread(self._thread.join, CONNECT_TIMEOUT_S)

    def _make_client(self, client_id: str, will: Will | None) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.max_queued_messages_set(MAX_QUEUED)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self._endpoint.tls:
            client.tls_set_context(self._endpoint.tls)
        if will:
            properties = Properties(PacketTypes.WILLMESSAGE)
            properties.WillDelayInterval = will.delay_s
            client.will_set(will.topic, will.payload, qos=1, retain=True, properties=properties)
        client.on_socket_open = _send_at_once
        client.on_socket_register_write = _leave_writing_to_the_loop
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        return client

    def _run(self) -> None:
        properties = Properties(PacketTypes.CONNECT)
        properties.ReceiveMaximum = self._receive_maximum
        properties.SessionExpiryInterval = SESSION_EXPIRY_S if self._persistent else 0
        while not self._stopping.is_set():
            try:
                self._client.connect(
                    self._endpoint.host,
                    self._endpoint.port,
                    keepalive=30,
                    clean_start=not self._persistent,
                    properties=properties,
                )
                self._client.loop_forever()
            except (OSError, ValueError):  # no route, refused, TLS trouble: the next attempt may do better
                self._say(False)
            self._stopping.wait(random.uniform(0, self._reconnect_max_s))

    def _on_connect(self, client: mqtt.Client, _data: object, _flags: object, code: object, _props: object) -> None:
        if getattr(code, "is_failure", True):
            return
        if self._topics:
            client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in sorted(self._topics)])
        self._say(True)

    def _on_disconnect(self, *_: object) -> None:
        self._say(False)

    def _say(self, is_connected: bool) -> None:
        if self.is_connected != is_connected:
            self.is_connected = is_connected
            self._hand_over(self._tell, is_connected)

    def _tell(self, is_connected: bool) -> None:
        if is_connected:
            self.ready.set()
        else:
            self.ready.clear()
        self._connected(is_connected)

    def _on_message(self, client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        self._hand_over(
            self._receive, message.topic, message.payload, lambda: client.ack(message.mid, message.qos) and None
        )

    def _hand_over(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _send_at_once(_client: mqtt.Client, _data: object, connection: socket.socket) -> None:
    """No Nagle: an acknowledgement that waits for the peer's delayed ACK would cost 40 ms per chunk."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_writing_to_the_loop(_client: mqtt.Client, _data: object, _connection: socket.socket) -> None:
    """Nothing to do: `loop_forever` is woken by what is queued.

    Without this callback paho writes in whatever thread publishes. OpenSSL does not stand a write beside the loop's
    read on one connection: the broker saw broken records, and the process died of a damaged heap.
    """
