"""Which stream sits in which row, purely: streams that decode fill the first rows without a gap, the one that reads its
prompt sits right behind them. A stream that joins or leaves says which rows must move.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass(frozen=True)
class Move:
    """The cache of a stream moves to a free row."""

    source: int
    target: int


@dataclass
class Batch(Generic[S]):
    """Rows 0..n-1 decode; row n, if any, is in prefill."""

    num_rows: int
    decoding: list[S] = field(default_factory=list)
    prefilling: S | None = None

    @property
    def has_room(self) -> bool:
        """Whether a stream may begin its prefill: one at a time."""
        return self.prefilling is None and len(self.decoding) < self.num_rows

    def row(self, stream: S) -> int:
        """The row of a stream in the batch."""
        return len(self.decoding) if stream is self.prefilling else _index(self.decoding, stream)

    def join(self, stream: S) -> int:
        """Begin the prefill of `stream`; returns its row."""
        if not self.has_room:
            raise RuntimeError("the batch has no room")
        self.prefilling = stream
        return len(self.decoding)

    def promote(self) -> None:
        """The prefill is done: its row is the next that decodes, so nothing moves."""
        if self.prefilling is None:
            raise RuntimeError("nothing is in prefill")
        self.decoding.append(self.prefilling)
        self.prefilling = None

    def leave(self, stream: S) -> tuple[list[Move], int]:
        """Take `stream` out; returns the moves, in order, and the row that is free afterwards."""
        if stream is self.prefilling:
            self.prefilling = None
            return [], len(self.decoding)
        hole, last = _index(self.decoding, stream), len(self.decoding) - 1
        moves = []
        if hole != last:
            moves.append(Move(last, hole))
            self.decoding[hole] = self.decoding[last]
        self.decoding.pop()
        if self.prefilling is None:
            return moves, last
        return [*moves, Move(last + 1, last)], last + 1


def _index(streams: list[S], stream: S) -> int:
    return next(at for at, other in enumerate(streams) if other is stream)
