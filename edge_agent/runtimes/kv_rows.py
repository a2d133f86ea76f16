"""Key and value buffers of a decoder whose graph writes into its own past: one row of every buffer per stream.

A buffer is [rows, heads, capacity, head_size] and is bound as past and as present at once, so no step copies a cache.
The pages are the system's: untouched ones cost nothing, and those of a stream that left are given back. Huge pages
are declined, for with them a short stream would hold the memory of a long one.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.runtimes.base import Array

CAPACITY_STEP = 64
"""Capacity is a multiple of this, which keeps rows on page borders for the usual head sizes."""


@dataclass(frozen=True)
class KvShape:
    """One layer's keys or values."""

    num_heads: int
    head_size: int
    dtype: str  # numpy's name

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.num_heads * self.head_size * np.dtype(self.dtype).itemsize


class KvRows:
    """The buffers of all layers, by the name of the graph's input."""

    def __init__(self, names: Sequence[str], shape: KvShape, num_rows: int, context_tokens: int) -> None:
        self.shape, self.num_rows = shape, num_rows
        self.capacity = -(-context_tokens // CAPACITY_STEP) * CAPACITY_STEP
        self.row_bytes = shape.token_bytes * self.capacity
        self._map_by_name = {name: _pages(self.row_bytes * num_rows) for name in names}
        dimensions = (num_rows, shape.num_heads, self.capacity, shape.head_size)
        self._array_by_name: dict[str, Array] = {
            name: np.frombuffer(pages, shape.dtype).reshape(dimensions) for name, pages in self._map_by_name.items()
        }

    @property
    def names(self) -> list[str]:
        """The buffers' names."""
        return list(self._array_by_name)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one stream over all buffers."""
        return self.shape.token_bytes * len(self._array_by_name)

    def array(self, name: str) -> Array:
        """A buffer: [rows, heads, capacity, head_size]."""
        return self._array_by_name[name]

    def pointer(self, name: str, row: int) -> int:
        """Address of a row."""
        return int(self._array_by_name[name].ctypes.data) + row * self.row_bytes

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of a row into another one and give the first one's pages back."""
        for array in self._array_by_name.values():
            array[target, :, :num_tokens] = array[source, :, :num_tokens]
        self.free(source)

    def free(self, row: int) -> None:
        """Give the row's pages back to the system."""
        begin = -(-row * self.row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        length = ((row + 1) * self.row_bytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        if length <= 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for pages in self._map_by_name.values():
            pages.madvise(mmap.MADV_DONTNEED, begin, length)


def _pages(num_bytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
