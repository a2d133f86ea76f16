"""Slows down whoever tries tokens: an address that showed `MAX_WRONG` different wrong ones within a minute has to wait.

The same wrong token again is a mistake, not a guess. While an address waits, only tokens that were good before are
looked at, so that a stranger behind it cannot lock out those who work there. Neighbours in one IPv6 network (/64)
count as one. Everything is bounded and in memory; a restart forgets, which gives an attacker little: tokens are 256
bits.
"""

from __future__ import annotations

import hashlib
import ipaddress
import threading
from collections import OrderedDict
from collections.abc import Callable

from wire.errors import OverloadedError

MAX_WRONG = 20
WINDOW_S = 60.0
MAX_ADDRESSES = 10_000
MAX_KNOWN = 10_000


class Guesses:
    """Wrong tokens by address, and the good ones seen lately; of both only digests."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, OrderedDict[bytes, float]] = OrderedDict()
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, address: str, secret: str) -> None:
        """Raise `OverloadedError` when this address has to wait and the token is not one seen good before."""
        digest = _digest(secret)
        with self._lock:
            wrong = self._wrong.get(_network(address))
            if wrong is None or digest in self._known:
                return
            now = self._clock()
            while wrong and (oldest := next(iter(wrong.values()))) <= now - WINDOW_S:
                wrong.popitem(last=False)
            if len(wrong) < MAX_WRONG:
                return
            wait_s = max(1, round(oldest + WINDOW_S - now))
        raise OverloadedError("too many wrong tokens from here", remedy="wait, then try again", retry_after_s=wait_s)

    def note_wrong(self, address: str, secret: str) -> None:
        """A token from this address was nobody's."""
        with self._lock:
            wrong = self._wrong.setdefault(_network(address), OrderedDict())
            wrong[_digest(secret)] = self._clock()
            wrong.move_to_end(_digest(secret))
            while len(wrong) > MAX_WRONG:
                wrong.popitem(last=False)
            self._wrong.move_to_end(_network(address))
            while len(self._wrong) > MAX_ADDRESSES:
                self._wrong.popitem(last=False)

    def note_right(self, secret: str) -> None:
        """This token was good."""
        with self._lock:
            self._known[_digest(secret)] = None
            self._known.move_to_end(_digest(secret))
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))
