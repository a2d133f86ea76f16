"""An append-only file of states: each record is on disk before `append` returns, the last whole record counts.

A record is length and CRC-32 (both big endian) and JSON. Reading stops at the first record that is short or damaged
and the file is cut there, so a torn write leaves the state before it. A write that fails is written over by the next
one: nothing ever follows a damaged record. After `MAX_RECORDS` the file is replaced by its last record, atomically.
"""

from __future__ import annotations

import io
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
        self.num_records, self.last, self._whole_bytes = _read(path)

    def append(self, record: dict[str, Any]) -> None:
        """Make `record` the last one; returns once it is durable. `OSError`: after a restart it may be the last or not.

        What follows the whole records, left by a cut or by a write that failed, is cut off first.
        """
        encoded = _encode(record)
        if self.num_records >= MAX_RECORDS or not self._path.exists():
            replace_durably(self._path, encoded, mode=0o600)
            self.num_records = self._whole_bytes = 0
        else:
            with self._path.open("r+b", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != self._whole_bytes:
                    file.truncate(self._whole_bytes)
                file.seek(self._whole_bytes)
                _write_all(file, encoded)
                os.fsync(file.fileno())
        self._whole_bytes += len(encoded)
        self.num_records += 1
        self.last = record


def _write_all(file: io.FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


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
        if not 0 < length <= MAX_RECORD_BYTES or len(body) != length or zlib.crc32(body) != checksum:
            break  # a length of 0 is no record: zeros that a cut left have the checksum of nothing
        last = json.loads(body)
        num_records += 1
        offset += _HEADER.size + length
    return num_records, last, offset
