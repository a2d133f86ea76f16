"""Digests of files that were hashed before and have not changed since, so that a warm build need not read them.

A file counts as unchanged while device, inode, size and both times are the same to the nanosecond. A file changed less
than two seconds before it was hashed is not remembered: a later change might not show in its times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from model_registry.sources import Source, hash_file
from wire.process import replace_durably

MAX_ENTRIES = 2000
_SETTLED_NS = 2_000_000_000


class SourceMemo:
    """Remembers digests in the file at `path`."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock_ns = clock_ns
        try:
            self._known: dict[str, list[object]] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            self._known = {}

    def hash_source(self, source: Source) -> Source:
        """`source` with every file's digest."""
        before = dict(self._known)
        files = tuple(replace(file, digest=self.digest(source.root / file.path)) for file in source.files)
        if self._known != before:
            newest = dict(list(self._known.items())[-MAX_ENTRIES:])
            replace_durably(self._path, json.dumps(newest).encode())
        return replace(source, files=files)

    def digest(self, path: Path) -> str:
        """SHA-256 of the file."""
        name = str(path.resolve())
        state = _state(path)
        known = self._known.get(name)
        if known is not None and known[:-1] == state:
            return str(known[-1])
        digest = hash_file(path)
        self._known.pop(name, None)
        if _state(path) == state and self._clock_ns() - max(state[3], state[4]) > _SETTLED_NS:
            self._known[name] = [*state, digest]
        return digest


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
