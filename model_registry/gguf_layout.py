"""The structure of a GGUF file, versions 2 and 3: key-values, tensor table, aligned tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only little-endian files are read. Long arrays
(token lists) are counted, not kept.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from model_registry.layout import BoundedReader, Span

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1_000_000
MAX_ARRAY_ITEMS = 20_000_000

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"), 4: _U32,
    5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"), 10: _U64, 11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}  # fmt: skip
_BLOCK_BY_TYPE = {  # ggml type -> (elements per block, bytes per block)
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
_WIDTH_BY_TYPE = {0: 4, 1: 2, 25: 2, 26: 4, 27: 4, 28: 4, 30: 2}

Value = int | float | bool | str | None


@dataclass(frozen=True)
class GgufLayout:
    """Version, the scalar key-values (arrays are None), and the tensors in order of their place."""

    version: int
    values: dict[str, Value]
    spans: tuple[Span, ...]

    @property
    def architecture(self) -> str:
        """`general.architecture`, or an empty string."""
        found = self.values.get("general.architecture")
        return found if isinstance(found, str) else ""


def read_gguf(path: Path) -> GgufLayout:
    """Read header and tensor table and check that every tensor lies inside the file."""
    with BoundedReader(path, "GGUF") as reader:
        magic = reader.read(4)
        if magic != MAGIC:
            raise reader.fault(f"starts with {magic!r}, not {MAGIC!r}")
        version = reader.number(_U32)
        if version not in VERSIONS:
            raise reader.fault(f"has GGUF version {version}; this build reads 2 and 3 in little-endian order")
        num_tensors, num_values = _count(reader), _count(reader)
        values = dict(_key_value(reader) for _ in range(num_values))
        table = [_tensor(reader) for _ in range(num_tensors)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise reader.fault(f"has alignment {alignment!r}")
        start = -(-reader.position // alignment) * alignment
        spans = sorted(Span(start + s.offset, s.size_bytes, s.element_bytes, s.name) for s in table)
        _check_inside(reader, spans, start)
        return GgufLayout(version, values, tuple(spans))


def _check_inside(reader: BoundedReader, spans: list[Span], start: int) -> None:
    end = start
    for span in spans:
        if span.offset < end:
            raise reader.fault(f"has overlapping tensors at {span.name!r}")
        end = span.offset + span.size_bytes
        if end > reader.size_bytes:
            raise reader.fault(f"is truncated: tensor {span.name!r} ends at {end} of {reader.size_bytes} bytes")


def _count(reader: BoundedReader) -> int:
    count = reader.number(_U64)
    if count > MAX_ENTRIES:
        raise reader.fault(f"states {count} entries")
    return count


def _string(reader: BoundedReader) -> str:
    return reader.read(reader.number(_U64), at_most=16 << 20).decode("utf-8", "replace")


def _key_value(reader: BoundedReader) -> tuple[str, Value]:
    key, kind = _string(reader), reader.number(_U32)
    if kind == _STRING:
        return key, _string(reader)
    if kind == _ARRAY:
        _skip_array(reader, key)
        return key, None
    if kind not in _SCALARS:
        raise reader.fault(f"holds key {key!r} of unknown type {kind}")
    form = _SCALARS[kind]
    value: Value = form.unpack(reader.read(form.size))[0]
    return key, value


def _skip_array(reader: BoundedReader, key: str) -> None:
    kind, count = reader.number(_U32), reader.number(_U64)
    if count > MAX_ARRAY_ITEMS:
        raise reader.fault(f"states {count} items in {key!r}")
    if kind == _STRING:
        for _ in range(count):
            length = reader.number(_U64)
            reader.read(length, at_most=16 << 20)
    elif kind in _SCALARS:
        reader.seek(reader.position + count * _SCALARS[kind].size)
    else:
        raise reader.fault(f"holds an array {key!r} of unknown type {kind}")


def _tensor(reader: BoundedReader) -> Span:
    name, num_dims = _string(reader), reader.number(_U32)
    if num_dims > 8:
        raise reader.fault(f"gives tensor {name!r} {num_dims} dimensions")
    shape = [reader.number(_U64) for _ in range(num_dims)]
    kind, offset = reader.number(_U32), reader.number(_U64)
    if kind not in _BLOCK_BY_TYPE:
        raise reader.fault(f"holds tensor {name!r} of unknown ggml type {kind}")
    per_block, block_bytes = _BLOCK_BY_TYPE[kind]
    count = math.prod(shape)
    if (shape and shape[0] % per_block) or count > 1 << 44:
        raise reader.fault(f"gives tensor {name!r} a shape {shape} that its type cannot have")
    return Span(offset, count // per_block * block_bytes, _WIDTH_BY_TYPE.get(kind, 1), name)
