"""systemd's notification socket (sd_notify(3)): ready, stopping, alive. Silent where systemd is not."""

from __future__ import annotations

import os
import socket
import time


class Watchdog:
    """Speaks to the socket that `NOTIFY_SOCKET` names when the agent starts."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._every_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        self._last = 0.0

    def say(self, message: str) -> None:
        """Send one message; nobody listening is no error."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(1)
            try:
                out.sendto(message.encode(), address)
            except OSError:
                self._address = ""

    def alive(self) -> None:
        """Say that the event loop still turns, at most as often as systemd wants."""
        if self._every_s and time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self.say("WATCHDOG=1")
