"""Where the tensors lie in a file: the type that the readers of safetensors, GGUF and ONNX share, and a bounded reader.

Readers look only at structure. They raise `UnsupportedModelError` for a file that is not what its name says or that
ends too early, never allocate more than a stated limit, and execute nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from wire.errors import UnsupportedModelError


@dataclass(frozen=True, order=True)
class Span:
    """The bytes of one tensor in a file; `element_bytes` is the width of its numbers where it is 2 or 4, else 1."""

    offset: int
    size_bytes: int
    element_bytes: int
    name: str = ""


class BoundedReader:
    """Reads a file from front to back; asking past its end or for too much at once is a fault of the file."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise UnsupportedModelError(f"{path.name} cannot be read: {error.strerror}", remedy="check it") from error
        self.size_bytes = path.stat().st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        """The offset of the next byte."""
        return self._file.tell()

    def read(self, size: int, *, at_most: int = 1 << 20) -> bytes:
        """The next `size` bytes."""
        if size > at_most:
            raise self.fault(f"states a length of {size} bytes where at most {at_most} make sense")
        data = self._file.read(size)
        if len(data) != size:
            raise self.fault("is truncated")
        return data

    def seek(self, offset: int) -> None:
        """Go to `offset`, which must lie inside the file or at its end."""
        if not 0 <= offset <= self.size_bytes:
            raise self.fault(f"is truncated: it points at byte {offset} of {self.size_bytes}")
        self._file.seek(offset)

    def number(self, form: struct.Struct) -> int:
        """One integer in the given form."""
        return int(form.unpack(self.read(form.size))[0])

    def fault(self, what: str) -> UnsupportedModelError:
        """The error that says what is wrong with this file."""
        return UnsupportedModelError(
            f"{self.path.name} {what}", remedy=f"give a complete {self.kind} file; download or export it again"
        )


WIDTH_BY_SAFETENSORS_TYPE: Mapping[str, int] = {
    "F64": 4, "I64": 4, "U64": 4, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
}  # fmt: skip
"""Plane width by dtype; 64-bit numbers are split as two halves, anything not named is bytes."""
