"""The ports of one home folder: free ones at the first start, the same ones ever after.

Devices remember the broker's and the gateway's address from their enrolment, so a restart must not move them.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

from wire.errors import ConflictError
from wire.process import free_port, replace_durably


class Ports:
    """Port numbers by process name, kept in a file."""

    def __init__(self, path: Path, host: str = "127.0.0.1") -> None:
        self._path = path
        self._host = host
        self._by_name: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str) -> int:
        """The port of `name`; a free one is chosen and remembered when it has none.

        Raises `ConflictError` when a remembered port is in use by somebody else.
        """
        if name not in self._by_name:
            self._by_name[name] = self._choose()
            replace_durably(self._path, json.dumps(self._by_name, indent=1).encode())
        port = self._by_name[name]
        if not _is_free(self._host, port):
            raise ConflictError(
                f"port {port} of {name} is in use",
                remedy=f"is another process running on this home? else remove {self._path} and enrol devices again",
            )
        return port

    def _choose(self) -> int:
        taken = set(self._by_name.values())
        while (port := free_port(self._host)) in taken:
            continue
        return port


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
