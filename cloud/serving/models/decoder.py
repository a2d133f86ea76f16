"""The decoder-only transformer that Llama, Qwen2 and Qwen3 share; a family's file says what differs.

The forward pass packs all tokens of a step into one batch and leaves attention, norms and products to a `Backend`.
Query, key and value weights are fused into one product, gate and up into another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cloud.serving.backend import Backend, Batch, Tensor
from cloud.serving.kv_pool import KvPool
from cloud.serving.models.experts import ExpertsConfig, mix_experts


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths slow down by `factor`, short ones stay, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of one model, in the field's terms."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_qk_norm: bool = False
    experts: ExpertsConfig | None = None
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)


@dataclass
class LayerWeights:
    """One layer. Weights are [out, in]; `qkv` and `gate_up` are stacked along out.

    With experts, `gate_up` and `down` have a first dimension of them and `router` is [experts, in].
    """

    input_norm: Tensor
    qkv: Tensor
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    router: Tensor | None = None


@dataclass
class DecoderWeights:
    """All weights of a model. `head` may be the embedding itself, prepared for products."""

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor


class Decoder:
    """Weights plus a backend: tokens in, hidden states and logits out."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, backend: Backend, max_positions: int) -> None:
        self.config = config
        self.weights = weights
        self.backend = backend
        self.scale = config.head_dim**-0.5
        cos, sin = rotary_tables(config, max_positions)
        self.cos = cos.to(weights.embedding.device, weights.embedding.dtype)
        self.sin = sin.to(weights.embedding.device, weights.embedding.dtype)

    def forward(self, batch: Batch, kv: KvPool, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Hidden states of the batch's output rows after the last norm, [R, hidden]. Writes keys and values into `kv`.

        `on_layer(i)` is called when layer i has written its keys and values.
        """
        backend, eps = self.backend, self.config.norm_eps
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]  # [T, D]
        residual = self.weights.embedding[batch.token_ids]  # [T, hidden]
        x = backend.rms_norm(residual, self.weights.layers[0].input_norm, eps)
        for index, layer in enumerate(self.weights.layers):
            if index:
                x, residual = backend.add_rms_norm(x, residual, layer.input_norm, eps)
            x = self._attention(x, layer, index, cos, sin, batch, kv)
            if on_layer is not None:
                on_layer(index)
            if index == len(self.weights.layers) - 1:
                # the last layer's MLP is needed only for rows that are used
                x, residual = x[batch.output_rows], residual[batch.output_rows]
            x, residual = backend.add_rms_norm(x, residual, layer.post_norm, eps)
            if self.config.experts is not None:
                x = mix_experts(x, layer, self.config.experts, backend)
            else:
                x = backend.linear(backend.silu_mul(backend.linear(x, layer.gate_up)), layer.down)
        x, _ = backend.add_rms_norm(x, residual, self.weights.norm, eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] to [R, vocab]."""
        return self.backend.linear(hidden, self.weights.head)

    def _attention(
        self, x: Tensor, layer: LayerWeights, index: int, cos: Tensor, sin: Tensor, batch: Batch, kv: KvPool
    ) -> Tensor:
        config, backend = self.config, self.backend
        num_rotated = config.num_heads + config.num_kv_heads
        qkv = backend.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, config.head_dim)  # [T, H + 2G, D]
        query_key = qkv[:, :num_rotated]
        if layer.q_norm is not None:
            query = backend.rms_norm(query_key[:, : config.num_heads], layer.q_norm, config.norm_eps)
            key = backend.rms_norm(query_key[:, config.num_heads :], layer.k_norm, config.norm_eps)
            query_key = torch.cat((query, key), dim=1)
        query_key = backend.rotary(query_key, cos, sin)
        query, key = query_key[:, : config.num_heads], query_key[:, config.num_heads :]
        backend.write_kv(key, qkv[:, num_rotated:], kv.keys[index], kv.values[index], batch)
        attended = backend.attend(query, kv.keys[index], kv.values[index], batch, self.scale)
        return backend.linear(attended, layer.output, layer.output_bias)


def rotary_tables(config: DecoderConfig, max_positions: int) -> tuple[Any, Any]:
    """cos and sin [max_positions, D] in float32 (RoFormer, arXiv 2104.09864, half-split; Llama 3 scaling)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * torch.pi / frequencies
    ratio = scaling.original_max_positions / wavelengths
    smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
