"""The tensors behind the block numbers: one paged KV cache for all layers, and blocks as bytes for hand-off.

Which block belongs to whom is `block_pool`'s business. A block that is referenced and sealed never changes, so
`read_block` may run in another thread than the engine's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from wire.errors import InsufficientSpaceError, IntegrityError

Tensor = Any


@dataclass(frozen=True)
class KvLayout:
    """Everything that must be equal before two workers may exchange blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # "float32", "bfloat16", "float16"

    @property
    def bytes_per_layer(self) -> int:
        """Bytes of one block in one layer, keys and values."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * _item_size(self.dtype)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers."""
        return self.num_layers * self.bytes_per_layer

    def fingerprint(self, model_digest: str) -> str:
        """Identity of the cache's content: weights, compute type and shape. Also the root of the block hashes."""
        text = (
            f"kv1|{model_digest}|{self.num_layers}|{self.num_kv_heads}|{self.head_dim}|{self.block_size}|{self.dtype}"
        )
        return hashlib.sha256(text.encode()).hexdigest()


def _item_size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


class KvPool:
    """Keys and values of `num_blocks` blocks: [layers, 2, num_blocks, block_size, kv_heads, head_dim]."""

    def __init__(self, layout: KvLayout, num_blocks: int, device: str = "cpu") -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (layout.num_layers, 2, num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)
        try:
            self.data = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=device)
        except RuntimeError as error:
            raise InsufficientSpaceError(
                f"{num_blocks} KV blocks need {num_blocks * layout.bytes_per_block} bytes",
                remedy="lower --kv-blocks",
                needed_bytes=num_blocks * layout.bytes_per_block,
            ) from error
        self.keys = [self.data[layer, 0] for layer in range(layout.num_layers)]
        self.values = [self.data[layer, 1] for layer in range(layout.num_layers)]

    def read_block(self, block: int, first_layer: int, num_layers: int) -> bytes:
        """Keys and values of one block in some layers, as bytes in the order [layer, 2, slot, head, dim]."""
        part = self.data[first_layer : first_layer + num_layers, :, block].contiguous().cpu()
        return part.view(torch.uint8).numpy().tobytes()

    def write_block(self, block: int, first_layer: int, num_layers: int, payload: bytes) -> None:
        """The reverse of `read_block`. Raises `IntegrityError` when the length is not exactly right."""
        expected = num_layers * self.layout.bytes_per_layer
        if len(payload) != expected or not 0 <= first_layer <= first_layer + num_layers <= self.layout.num_layers:
            raise IntegrityError(
                f"KV payload of {len(payload)} bytes for layers {first_layer}+{num_layers}, expected {expected} bytes",
                remedy="recompute the block",
            )
        target = self.data[first_layer : first_layer + num_layers, :, block]
        flat = torch.frombuffer(bytearray(payload), dtype=self.data.dtype)
        target.copy_(flat.view(target.shape))
