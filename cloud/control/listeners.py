"""The control plane's two doors: one for people (tokens, pages), one for devices (their certificates, HTTPS only).

Both serve the same application. A connection through the devices' door tells it which certificate TLS verified, or
that there was none, in `scope["state"]`; whatever a client sends cannot touch that. On both, a client that does not
finish its request line and headers in `HEADER_TIMEOUT_S` is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloud.control.api.base import DOOR, PEER
from cloud.control.certificates import PeerCertificate
from wire.exposure import KEEP_ALIVE_S

HEADER_TIMEOUT_S = 15.0
MAX_HEADER_BYTES = 32 * 1024
MAX_CONNECTIONS = 5000
GRACE_S = 3


class Door(H11Protocol):
    """HTTP/1.1 with a deadline for the headers."""

    header_timeout_s = HEADER_TIMEOUT_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock starts before the first byte."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A byte now and then does not buy more time; a whole request does."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for."""
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._deadline is None and self.timeout_keep_alive_task is None:
            self._deadline = self.loop.call_later(self.header_timeout_s, self._expire)

    def _expire(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class DeviceDoor(Door):
    """The same, over mutual TLS: tells the application whose certificate this is."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The handshake is done: what it verified is known now and for as long as the connection lasts."""
        super().connection_made(transport)
        shown: dict[str, Any] = transport.get_extra_info("peercert") or {}
        serial = shown.get("serialNumber")
        peer = PeerCertificate(f"{int(serial, 16):x}") if serial else None
        self.app_state = {**self.app_state, DOOR: "device", PEER: peer}


class DeviceServer(uvicorn.Server):
    """The devices' door; whoever runs the people's door starts and stops it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the other server's."""
        yield


def people_config(application: ASGIApp, tls: tuple[Path, Path] | None) -> uvicorn.Config:
    """The door for people; TLS when there is a certificate and its key."""
    certificate, key = tls or (None, None)
    return uvicorn.Config(
        application, http=Door, ws="none", log_level="warning", timeout_graceful_shutdown=GRACE_S, server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES, limit_concurrency=MAX_CONNECTIONS, proxy_headers=False,
        ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip


def device_config(application: ASGIApp, certificate: Path, key: Path, ca_file: Path) -> uvicorn.Config:
    """The door for devices: our certificate, and theirs from our authority; only `enrol` works without one."""
    return uvicorn.Config(
        application, http=DeviceDoor, ws="none", log_level="warning", timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=KEEP_ALIVE_S, server_header=False, lifespan="off", proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES, limit_concurrency=MAX_CONNECTIONS,
        ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=str(ca_file), ssl_cert_reqs=ssl.CERT_OPTIONAL,
    )  # fmt: skip
