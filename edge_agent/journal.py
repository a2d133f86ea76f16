"""An append-only file of states: each record is on disk before `append` returns, the last whole record counts.

A record is length and CRC-32 (both big endian) and JSON. Reading stops at the first record that is short or damaged
and the file is cut there, so a torn write leaves the state before it. After `MAX_RECORDS` the file is replaced by its
last record, atomically.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from wire.process import replace_durably

MAX_RECORDS = 256
MAX_RECORD_BYTES = 64 * 1024
_HEADER = struct.Struct(">II")


class Journal:
    """One journal file. Not for two writers at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.num_records, self.last, whole = _read(path)
        if path.exists() and path.stat().st_size != whole:
            with path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())

    def append(self, record: dict[str, Any]) -> None:
        """Make `record` the last one; returns once it is durable."""
        encoded = _encode(record)
        if self.num_records >= MAX_RECORDS or not self._path.exists():
            replace_durably(self._path, encoded, mode=0o600)
            self.num_records = 0
        else:
            with self._path.open("ab") as file:
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())
        self.num_records += 1
        self.last = record


def _encode(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return _HEADER.pack(len(body), zlib.crc32(body)) + body


def _read(path: Path) -> tuple[int, dict[str, Any] | None, int]:
    """Number of whole records, the last of them, and the offset where the whole ones end."""
    num_records, last, offset = 0, None, 0
    data = path.read_bytes() if path.exists() else b""
    while offset + _HEADER.size <= len(data):
        length, checksum = _HEADER.unpack_from(data, offset)
        body = data[offset + _HEADER.size : offset + _HEADER.size + length]
        if length > MAX_RECORD_BYTES or len(body) != length or zlib.crc32(body) != checksum:
            break
        last = json.loads(body)
        num_records += 1
        offset += _HEADER.size + length
    return num_records, last, offset
