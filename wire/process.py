"""What every Foreshore process promises its supervisor: a port file, and not to outlive it.

`write_port_file` is the sign that a server accepts connections; `die_with_parent` asks the kernel for a signal when the
parent ends, however it ends (Linux `prctl(PR_SET_PDEATHSIG)`; elsewhere a no-op that says so by its result).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import sys
import tempfile
from pathlib import Path

LOWEST_FREE_PORT = 20000
NUM_PORT_TRIALS = 50
_PR_SET_PDEATHSIG = 1


def die_with_parent(signum: int = signal.SIGTERM, *, parent: int | None = None) -> bool:
    """Have the kernel send `signum` to this process when its parent ends; True where that is possible.

    The parent may have died before the call took effect: then this process ends at once. Who knows its parent's id
    from the parent itself gives it, since a parent that died before this call is only noticed by that.
    """
    if sys.platform != "linux":
        return False
    parent = os.getppid() if parent is None else parent
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum) != 0:
        return False
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)
    return True


def write_port_file(path: Path, host: str, port: int) -> None:
    """Say where this process listens, as JSON `{"host", "port", "pid"}`; the file appears whole or not at all."""
    replace_durably(path, json.dumps({"host": host, "port": port, "pid": os.getpid()}).encode())


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now. Prefer `--port 0` with a port file; this is for peers told in advance.

    The port lies below those that the kernel lends to clients, where a connection could take it before its owner binds.
    """
    candidates = range(LOWEST_FREE_PORT, _lowest_lent_port())
    for port in random.SystemRandom().sample(candidates, min(NUM_PORT_TRIALS, len(candidates))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _lowest_lent_port() -> int:
    """Where the ports of outgoing connections begin; 32768 unless the kernel says otherwise."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32768


def replace_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path` so that a power cut leaves the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
