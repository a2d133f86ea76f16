"""Fixed-size KV blocks: names by content, reference counts, and a free list whose order is the order of eviction.

Rules, in order:
1. A full block is immutable and named by `hash_block(parent, tokens)`; the chain starts at `chain_root`, which binds
   the model and the tenant's salt, so equal tokens of two tenants never meet.
2. A block is in the free list exactly when nobody references it. A free block keeps its name and can be found again
   until it is allocated for something else.
3. Blocks without a name are reused first; of one sequence the tail goes before the head, because a head serves more
   prompts.

Pure: no torch, no clock, no threads. The tensors behind the block numbers belong to `kv_pool`.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from wire.errors import InvalidInputError

HASH_BYTES = 32
_ROOT_TAG = b"foreshore.kv.root.1"
_BLOCK_TAG = b"foreshore.kv.block.1"


def chain_root(model_identity: str, salt: bytes) -> bytes:
    """The parent of every first block: binds the model (weights and compute type) and the tenant's salt."""
    return _digest(_ROOT_TAG, model_identity.encode(), salt)


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of the block that follows `parent` and holds `token_ids`."""
    return _digest(_BLOCK_TAG, parent, struct.pack(f"<{len(token_ids)}I", *token_ids))


def hash_blocks(root: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Names of all full blocks of `token_ids`."""
    hashes: list[bytes] = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        hashes.append(hash_block(hashes[-1] if hashes else root, token_ids[start : start + block_size]))
    return hashes


def _digest(*fields: bytes) -> bytes:
    """SHA-256 over length-prefixed fields: no two different field lists share an input."""
    hasher = hashlib.sha256()
    for item in fields:
        hasher.update(struct.pack("<Q", len(item)))
        hasher.update(item)
    return hasher.digest()


class BlockPool:
    """Book-keeping of `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InvalidInputError(
                f"{num_blocks} KV blocks of {block_size} tokens cannot hold a sequence",
                remedy="give at least one block of at least one token",
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self.version = 0  # grows whenever the set of names changes
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._block_by_name: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody references, named or not."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks that are referenced, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks for writing, evicting the oldest names when needed; None, and no change, if too few."""
        if count > len(self._free):
            return None
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def find_prefix(self, names: Iterable[bytes]) -> list[int]:
        """Blocks of the longest leading run of `names` that are here. Nothing is locked; see `lock`."""
        found = []
        for name in names:
            block = self._block_by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` would leave the free list if they were locked."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def lock(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of one sequence, given head first."""
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise InvalidInputError(f"block {block} is free already", remedy="free each reference once")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._names[block] is None:
                    self._free.move_to_end(block, last=False)

    def seal(self, block: int, name: bytes) -> None:
        """Name a full block; from now on it is immutable. If another block holds the name, this one stays nameless."""
        if self._references[block] == 0:
            raise InvalidInputError(f"block {block} is free and cannot be sealed", remedy="seal while it is referenced")
        if name in self._block_by_name:
            return
        if self._names[block] is not None:
            raise InvalidInputError(f"block {block} already has a name", remedy="a full block never changes")
        self._names[block] = name
        self._block_by_name[name] = block
        self.version += 1

    def clear_names(self) -> None:
        """Forget every cached prefix; blocks in use stay in use."""
        self._block_by_name.clear()
        self._names = [None] * self.num_blocks
        self.version += 1

    def names(self) -> list[bytes]:
        """Names of all blocks that can be found, oldest first."""
        return list(self._block_by_name)

    def references(self, block: int) -> int:
        """How many sequences use this block."""
        return self._references[block]

    def check_integrity(self) -> None:
        """Raise `AssertionError` when the book-keeping contradicts itself. For tests and idle moments."""
        for block, count in enumerate(self._references):
            assert count >= 0, f"block {block} has {count} references"
            assert (count == 0) == (block in self._free), f"block {block}: {count} references, free list disagrees"
        named = {block for block, name in enumerate(self._names) if name is not None}
        assert named == set(self._block_by_name.values()), "names and blocks disagree"
        assert all(self._names[block] == name for name, block in self._block_by_name.items()), "a name is misfiled"

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            del self._block_by_name[name]
            self._names[block] = None
            self.num_evictions += 1
            self.version += 1
