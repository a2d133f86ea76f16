"""A Llama computed straight from a GGUF file, as its format defines it: the yardstick for what an import must mean.

Independent of transformers and of the importer: rows of queries and keys stay in the file's order, so the rotary
embedding turns neighbouring pairs (2i, 2i+1), as GGML's does. NumPy, float64, no cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, Any]


class GgufLlama:
    """Logits and greedy continuations of the file at `path`."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._fields = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type)
            .reshape(tuple(map(int, reversed(t.shape))))
            .astype(float)
            for t in reader.tensors
        }

    def logits(self, tokens: list[int]) -> Array:
        """[length, vocabulary] of `tokens`."""
        x = self._tensors["token_embd.weight"][tokens]
        for layer in range(self._field("block_count")):
            x = x + self._attention(self._norm(x, f"blk.{layer}.attn_norm"), layer)
            x = x + self._feed_forward(self._norm(x, f"blk.{layer}.ffn_norm"), layer)
        head = self._tensors.get("output.weight", self._tensors["token_embd.weight"])
        return np.asarray(self._norm(x, "output_norm") @ head.T)

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """The `count` likeliest tokens after `tokens`, one by one."""
        found = list(tokens)
        for _ in range(count):
            found.append(int(self.logits(found)[-1].argmax()))
        return found[len(tokens) :]

    def _field(self, name: str) -> Any:
        return self._fields[f"{self._fields['general.architecture']}.{name}"]

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self._field("attention.layer_norm_rms_epsilon"))
        return np.asarray(x / scale * self._tensors[f"{name}.weight"])

    def _attention(self, x: Array, layer: int) -> Array:
        heads, kv_heads = self._field("attention.head_count"), self._field("attention.head_count_kv")
        q, k, v = (x @ self._tensors[f"blk.{layer}.attn_{part}.weight"].T for part in "qkv")
        length, size = len(x), q.shape[1] // heads
        q = self._turn(q.reshape(length, heads, size))
        k = self._turn(k.reshape(length, kv_heads, size)).repeat(heads // kv_heads, axis=1)
        v = v.reshape(length, kv_heads, size).repeat(heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
        return np.asarray(mixed @ self._tensors[f"blk.{layer}.attn_output.weight"].T)

    def _turn(self, x: Array) -> Array:
        """Rotary embedding of [length, heads, size]: pairs of neighbours, base `rope.freq_base`."""
        length, _, size = x.shape
        angles = np.arange(length)[:, None] * self._field("rope.freq_base") ** (-np.arange(0, size, 2) / size)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def _feed_forward(self, x: Array, layer: int) -> Array:
        gate, up = (x @ self._tensors[f"blk.{layer}.ffn_{part}.weight"].T for part in ("gate", "up"))
        return np.asarray((gate / (1 + np.exp(-gate)) * up) @ self._tensors[f"blk.{layer}.ffn_down.weight"].T)
