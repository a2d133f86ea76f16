"""The structure of a safetensors file: an 8-byte length, a JSON header, then the tensors.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_registry.layout import WIDTH_BY_SAFETENSORS_TYPE, BoundedReader, Span

MAX_HEADER_BYTES = 100_000_000

_LENGTH = struct.Struct("<Q")
_BITS_BY_TYPE = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsLayout:
    """The tensors of one file in order of their place, and the header's free text."""

    spans: tuple[Span, ...]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> SafetensorsLayout:
    """Read the header and check that every tensor lies inside the file, none overlaps, and all lengths fit."""
    with BoundedReader(path, "safetensors") as reader:
        length = reader.number(_LENGTH)
        if length > min(MAX_HEADER_BYTES, reader.size_bytes):
            raise reader.fault(f"states a header of {length} bytes")
        try:
            header = json.loads(reader.read(length, at_most=MAX_HEADER_BYTES))
        except (ValueError, RecursionError) as error:
            raise reader.fault("has a header that is not JSON") from error
        if not isinstance(header, dict):
            raise reader.fault("has a header that is not an object")
        metadata = header.pop("__metadata__", {})
        spans = sorted(_span(reader, name, entry, 8 + length) for name, entry in header.items())
        end = 8 + length
        for span in spans:
            if span.offset != end:
                raise reader.fault(f"has a gap or overlap before tensor {span.name!r}")
            end += span.size_bytes
        if end != reader.size_bytes:
            raise reader.fault(f"has {reader.size_bytes} bytes, its header says {end}")
        return SafetensorsLayout(tuple(spans), dict(metadata) if isinstance(metadata, dict) else {})


def _span(reader: BoundedReader, name: str, entry: Any, data_offset: int) -> Span:
    try:
        kind, shape = str(entry["dtype"]), [int(size) for size in entry["shape"]]
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise reader.fault(f"describes tensor {name!r} wrongly") from error
    if kind not in _BITS_BY_TYPE:
        raise reader.fault(f"holds tensor {name!r} of unknown type {kind!r}")
    if end - begin != (math.prod(shape) * _BITS_BY_TYPE[kind] + 7) // 8 or begin < 0:
        raise reader.fault(f"gives tensor {name!r} {end - begin} bytes, its shape needs others")
    if data_offset + end > reader.size_bytes:
        raise reader.fault(f"is truncated: tensor {name!r} ends at {data_offset + end} of {reader.size_bytes} bytes")
    return Span(data_offset + begin, end - begin, WIDTH_BY_SAFETENSORS_TYPE.get(kind, 1), name)
