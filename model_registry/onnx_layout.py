"""The structure of an ONNX file, read from its protobuf bytes without the onnx package.

Walks `ModelProto` and its graphs (onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) field by field,
skipping what it does not need, so memory stays small however large the weights are. Finds the raw data of
initialisers and constants inside the file, and the parts of external data files that the model names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from model_registry.layout import BoundedReader, Span

MAX_DEPTH = 16
MAX_TENSORS = 1_000_000

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BITS_BY_TYPE = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
_STRING_TENSOR = 8


@dataclass(frozen=True)
class ExternalSpan:
    """Bytes of a tensor in another file; `size_bytes` None means: to the end of that file."""

    location: str
    offset: int
    size_bytes: int | None
    element_bytes: int
    name: str


@dataclass
class OnnxLayout:
    """What the walk found; filled by `read_onnx` and not changed after."""

    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
    num_nodes: int = 0
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    external: list[ExternalSpan] = field(default_factory=list)

    @property
    def external_files(self) -> list[str]:
        """Relative paths of the external data files, sorted."""
        return sorted({span.location for span in self.external})


@dataclass
class _Tensor:
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    name: str = ""
    raw: tuple[int, int] | None = None  # offset, length
    typed: tuple[int, int] | None = None
    entries: dict[str, str] = field(default_factory=dict)
    is_external: bool = False


def read_onnx(path: Path) -> OnnxLayout:
    """Walk the file and check that it is a complete model; external files are named, not opened."""
    with BoundedReader(path, "ONNX") as reader:
        layout = OnnxLayout()
        _Walk(reader, layout).model()
        if layout.num_nodes == 0 or not layout.outputs:
            raise reader.fault("holds no graph with nodes and outputs")
        if layout.ir_version < 3 or not layout.opsets:
            raise reader.fault("names no ONNX version or operator set, or is truncated")
        layout.spans.sort()
        return layout


class _Walk:
    """One pass over the file; each method reads one kind of message up to `end`."""

    def __init__(self, reader: BoundedReader, layout: OnnxLayout) -> None:
        self._reader = reader
        self._layout = layout
        self._num_tensors = 0

    def model(self) -> None:
        for number, kind, value in self._fields(self._reader.size_bytes):
            if number == 1 and kind == _VARINT:
                self._layout.ir_version = value
            elif number == 7 and kind == _BYTES:
                self._graph(value, 0)
            elif number == 8 and kind == _BYTES:
                domain, version = self._opset(value)
                self._layout.opsets[domain] = version
            elif number == 25 and kind == _BYTES:  # local functions hold nodes
                self._nested(value, {7: lambda end: self._node(end, 1)})

    def _graph(self, end: int, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._reader.fault(f"nests graphs more than {MAX_DEPTH} deep")
        for number, kind, value in self._fields(end):
            if kind != _BYTES:
                continue
            if number == 1:
                self._layout.num_nodes += 1
                self._node(value, depth)
            elif number == 5:
                self._tensor(value)
            elif number in (11, 12) and depth == 0:
                names = self._layout.inputs if number == 11 else self._layout.outputs
                names.append(self._first_string(value))
            elif number == 15:  # sparse initialiser: values, indices
                self._nested(value, {1: self._tensor, 2: self._tensor})

    def _node(self, end: int, depth: int) -> None:
        self._nested(end, {5: lambda inner: self._attribute(inner, depth)})

    def _attribute(self, end: int, depth: int) -> None:
        graph: Callable[[int], None] = lambda inner: self._graph(inner, depth + 1)  # noqa: E731
        self._nested(end, {5: self._tensor, 6: graph, 10: self._tensor, 11: graph})

    def _nested(self, end: int, handlers: dict[int, Callable[[int], None]]) -> None:
        for number, kind, value in self._fields(end):
            if kind == _BYTES and number in handlers:
                handlers[number](value)

    def _opset(self, end: int) -> tuple[str, int]:
        domain, version = "", 0
        for number, kind, value in self._fields(end):
            if number == 1 and kind == _BYTES:
                domain = self._text(value)
            elif number == 2 and kind == _VARINT:
                version = value
        return domain, version

    def _first_string(self, end: int) -> str:
        found = ""
        for number, kind, value in self._fields(end):
            if number == 1 and kind == _BYTES:
                found = self._text(value)
        return found

    def _tensor(self, end: int) -> None:
        self._num_tensors += 1
        if self._num_tensors > MAX_TENSORS:
            raise self._reader.fault(f"holds more than {MAX_TENSORS} tensors")
        tensor = _Tensor()
        for number, kind, value in self._fields(end):
            if number == 1:
                tensor.dims += [value] if kind == _VARINT else self._packed_varints(value)
            elif number == 2 and kind == _VARINT:
                tensor.data_type = value
            elif number == 8 and kind == _BYTES:
                tensor.name = self._text(value)
            elif number == 9 and kind == _BYTES:
                tensor.raw = (self._reader.position, value - self._reader.position)
            elif number in (4, 10) and kind == _BYTES:
                tensor.typed = (self._reader.position, value - self._reader.position)
            elif number == 13 and kind == _BYTES:
                key, text = self._entry(value)
                tensor.entries[key] = text
            elif number == 14 and kind == _VARINT:
                tensor.is_external = value == 1
        self._keep(tensor)

    def _keep(self, tensor: _Tensor) -> None:
        width = {16: 2, 32: 4, 64: 4}.get(_BITS_BY_TYPE.get(tensor.data_type, 8), 1)
        if tensor.data_type not in _BITS_BY_TYPE and tensor.data_type != _STRING_TENSOR:
            raise self._reader.fault(f"holds tensor {tensor.name!r} of unknown type {tensor.data_type}")
        if tensor.is_external:
            self._layout.external.append(self._external(tensor, width))
        elif tensor.raw is not None:
            offset, length = tensor.raw
            needed = (math.prod(tensor.dims) * _BITS_BY_TYPE.get(tensor.data_type, 8) + 7) // 8
            if length != needed:
                raise self._reader.fault(f"gives tensor {tensor.name!r} {length} bytes, its shape needs {needed}")
            self._layout.spans.append(Span(offset, length, width, tensor.name))
        elif tensor.typed is not None:
            self._layout.spans.append(Span(*tensor.typed, 4, tensor.name))

    def _external(self, tensor: _Tensor, width: int) -> ExternalSpan:
        location = tensor.entries.get("location", "")
        parts = PurePosixPath(location).parts
        if not parts or location.startswith("/") or ".." in parts or "\\" in location:
            raise self._reader.fault(f"keeps tensor {tensor.name!r} at {location!r}, outside of its folder")
        try:
            offset = int(tensor.entries.get("offset", "0"))
            length = int(tensor.entries["length"]) if "length" in tensor.entries else None
        except ValueError as error:
            raise self._reader.fault(f"places tensor {tensor.name!r} wrongly") from error
        if offset < 0 or (length is not None and length < 0):
            raise self._reader.fault(f"places tensor {tensor.name!r} wrongly")
        return ExternalSpan(PurePosixPath(location).as_posix(), offset, length, width, tensor.name)

    def _entry(self, end: int) -> tuple[str, str]:
        key = text = ""
        for number, kind, value in self._fields(end):
            if kind == _BYTES and number == 1:
                key = self._text(value)
            elif kind == _BYTES and number == 2:
                text = self._text(value)
        return key, text

    def _text(self, end: int) -> str:
        return self._reader.read(end - self._reader.position, at_most=1 << 16).decode("utf-8", "replace")

    def _packed_varints(self, end: int) -> list[int]:
        numbers = []
        while self._reader.position < end:
            numbers.append(self._varint())
            if len(numbers) > 64:
                raise self._reader.fault("holds a tensor with more than 64 dimensions")
        return numbers

    def _fields(self, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (field number, wire type, value); for bytes the value is where they end, and the reader is at them."""
        while self._reader.position < end:
            key = self._varint()
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                yield number, kind, self._varint()
            elif kind == _BYTES:
                length = self._varint()
                stop = self._reader.position + length
                if stop > end:
                    raise self._reader.fault("is truncated or not ONNX")
                yield number, kind, stop
                self._reader.seek(stop)
            elif kind in (_FIXED64, _FIXED32):
                self._reader.read(8 if kind == _FIXED64 else 4)
            else:
                raise self._reader.fault("is not ONNX")
            if number == 0:
                raise self._reader.fault("is not ONNX")
        if self._reader.position != end:
            raise self._reader.fault("is truncated or not ONNX")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._reader.read(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise self._reader.fault("is not ONNX")
