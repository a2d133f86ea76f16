"""Where a process may listen: loopback as it likes, anywhere else only with TLS (and whoever asks must be known)."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from wire.errors import InvalidInputError, UnavailableError

KEEP_ALIVE_S = 75
"""How long a server keeps an idle connection: longer than clients do (httpx 5 s, aiohttp 15 s, proxies 60 s).

Whoever closes first may close while the other sends, and a request is lost; a client knows that it is sending.
"""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_tls_off_loopback(host: str, *, has_tls: bool, remedy: str) -> None:
    """Refuse to listen in the open; raises `InvalidInputError`."""
    if not has_tls and not is_loopback(host):
        raise InvalidInputError(f"--host {host} without TLS would carry tokens in the open", remedy=remedy)


def listen(host: str, port: int, backlog: int = 512) -> socket.socket:
    """A listening TCP socket whose connections send at once; port 0 takes a free one.

    asyncio turns Nagle's algorithm off only for sockets that name their protocol, which `socket.create_server` does
    not: an answer in two writes would then wait some 40 ms for the peer's delayed acknowledgement. Raises
    `UnavailableError`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise UnavailableError(f"cannot listen on {host}:{port}: {error}", remedy="choose another port") from error
    return listener
