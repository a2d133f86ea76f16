"""The seam between the models and the hardware: the few operations a decoder needs, and the batch they work on.

A `Backend` owns the arithmetic and nothing else: no scheduling, no block book-keeping, no weights. `torch_backend` is
the CPU implementation and the reference; a GPU backend plugs in here with its own kernels and may add its own fields to
`Batch` by subclassing it in its `plan` method.

Shapes: T tokens in the step (all sequences packed, no padding), S sequences, H query heads, G KV heads, D head size.
The KV cache of a layer is two tensors [num_blocks, block_size, G, D]; slot = block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cloud.serving.request import SamplingParams

if TYPE_CHECKING:
    from cloud.serving.guide import Guide

Tensor = Any  # torch is not followed by the type checker


@dataclass(frozen=True)
class SequencePlan:
    """One sequence of a step on the host: `num_tokens` new tokens that end at `context_len` (new ones included)."""

    block_ids: Sequence[int]
    num_tokens: int
    context_len: int


@dataclass
class Batch:
    """What every layer of a step needs to know. Rows of one sequence are neighbours, in order of position."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: where each token's key and value go
    sequences: Sequence[SequencePlan]
    output_rows: Tensor  # [R] int64: rows whose last hidden states are wanted, to draw from or to pool


@dataclass(frozen=True)
class SamplingRow:
    """What the draw of one token depends on besides its logits."""

    params: SamplingParams
    output_index: int  # 0 for the first output token; with the seed it fixes the draw
    prompt_token_ids: Sequence[int]  # read only with a repetition penalty
    output_token_ids: Sequence[int]  # read only with penalties or a guide
    guide: Guide | None = None  # what may follow, for an answer that must match a schema


@dataclass(frozen=True)
class SampledToken:
    """A drawn token; log probabilities (natural, of the unmodified distribution) only when they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Embedding:
    """The vector of a whole input: float32 [hidden], of length 1, on the host."""

    vector: np.ndarray[Any, np.dtype[np.float32]]


StepResult = SampledToken | Embedding | None  # what a step gives for one chunk


class Backend(Protocol):
    """Operations of a decoder-only transformer over a paged KV cache."""

    def prepare_weight(self, weight: Tensor, *, is_head: bool = False) -> Tensor:
        """Bring a linear layer's weight [out, in] into the form that `linear` likes best; called once per weight.

        The head's logits decide tokens: where weights are rounded, it keeps more bits.
        """
        ...

    def plan(self, batch: Batch) -> Batch:
        """Add what this backend's kernels need for the step (index tensors, splits); called once per step."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times a prepared weight, plus bias: [T, out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension, computed in float32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); may overwrite both inputs."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(first half) * second half of the last dimension: [T, 2I] to [T, I]."""
        ...

    def rotary(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads [T, N, D] by cos and sin [T, D] (half-split convention of Llama)."""
        ...

    def write_kv(self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> None:
        """Store key and value [T, G, D] in the slots of the batch."""
        ...

    def attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float) -> Tensor:
        """Causal attention of query [T, H, D] over each sequence's whole context: [T, H * D]."""
        ...

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Draw one token per row of logits [R, V]."""
        ...
