"""Where a process may listen: loopback as it likes, anywhere else only with TLS (and whoever asks must be known)."""

from __future__ import annotations

from ipaddress import ip_address

from wire.errors import InvalidInputError


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
