"""KV blocks on their way from a prefill worker to a decode worker: what is sent, and what is believed.

The receiver decides alone whether a block is right:
1. it belongs to this hand-off: the lease epoch is the one the receiver drew for it (a replayed or stale one differs);
2. it is the block that comes next, and its name is the chained hash the receiver computed from its own tokens;
3. its content digest covers epoch, place, name and payload, so a flipped, swapped or truncated part is seen.
What fails is refused with `IntegrityError` and computed by the receiver: a bad hand-off costs time, never a token.

Pure: bytes in, verdict out. No torch, no network.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wire.errors import IntegrityError

MAX_PAYLOAD_BYTES = 2 << 20
_TAG = b"foreshore.kv.handoff.1"


@dataclass(frozen=True)
class Part:
    """Some layers of one block."""

    index: int  # of the block in the sequence
    block_hash: bytes
    lease_epoch: int
    first_layer: int
    num_layers: int
    payload: bytes
    content_digest: bytes


def make_part(index: int, block_hash: bytes, lease_epoch: int, first_layer: int, num_layers: int, data: bytes) -> Part:
    """A part with its digest."""
    digest = content_digest(index, block_hash, lease_epoch, first_layer, num_layers, data)
    return Part(index, block_hash, lease_epoch, first_layer, num_layers, data, digest)


def content_digest(
    index: int, block_hash: bytes, lease_epoch: int, first_layer: int, num_layers: int, payload: bytes
) -> bytes:
    """SHA-256 over everything that a part claims, length-prefixed."""
    hasher = hashlib.sha256(_TAG)
    hasher.update(struct.pack("<IQIIQQ", index, lease_epoch, first_layer, num_layers, len(block_hash), len(payload)))
    hasher.update(block_hash)
    hasher.update(payload)
    return hasher.digest()


def split_layers(
    num_layers: int, bytes_per_layer: int, max_bytes: int = MAX_PAYLOAD_BYTES
) -> Iterator[tuple[int, int]]:
    """(first layer, number of layers) of each part of a block, each at most `max_bytes` where a layer allows it."""
    size = max(1, max_bytes // bytes_per_layer)
    for first in range(0, num_layers, size):
        yield first, min(size, num_layers - first)


class Receiver:
    """Checks the parts of one hand-off in order; `num_complete_blocks` says how far it can be trusted."""

    def __init__(
        self, block_hashes: Sequence[bytes], num_held_blocks: int, lease_epoch: int, num_layers: int, layer_bytes: int
    ) -> None:
        self._hashes = block_hashes
        self._epoch = lease_epoch
        self._num_layers = num_layers
        self._layer_bytes = layer_bytes
        self._first = num_held_blocks
        self._index = num_held_blocks
        self._layer = 0
        self.num_bytes = 0

    @property
    def num_complete_blocks(self) -> int:
        """Received blocks of which every layer was right."""
        return self._index - self._first

    @property
    def is_complete(self) -> bool:
        """True when every wanted block is here."""
        return self._index == len(self._hashes)

    def accept(self, part: Part) -> None:
        """Check the next part; raises `IntegrityError` and stays as it was when anything is wrong with it."""
        if part.lease_epoch != self._epoch:
            raise IntegrityError(
                f"KV block {part.index} carries lease epoch {part.lease_epoch}, this hand-off has {self._epoch}",
                remedy="recompute the prompt",
            )
        if self.is_complete or (part.index, part.first_layer) != (self._index, self._layer):
            raise IntegrityError(
                f"KV block {part.index} layer {part.first_layer} came, {self._index} layer {self._layer} was next",
                remedy="recompute the prompt",
            )
        if part.block_hash != self._hashes[part.index]:
            raise IntegrityError(f"KV block {part.index} belongs to other tokens", remedy="recompute the prompt")
        end = part.first_layer + part.num_layers
        if part.num_layers < 1 or end > self._num_layers or len(part.payload) != part.num_layers * self._layer_bytes:
            raise IntegrityError(
                f"KV block {part.index} has {len(part.payload)} bytes for {part.num_layers} layers",
                remedy="recompute the prompt",
            )
        expected = content_digest(
            part.index, part.block_hash, part.lease_epoch, part.first_layer, part.num_layers, part.payload
        )
        if part.content_digest != expected:
            raise IntegrityError(f"the content of KV block {part.index} is damaged", remedy="recompute the prompt")
        self.num_bytes += len(part.payload)
        self._layer = end % self._num_layers
        self._index += 1 if end == self._num_layers else 0
