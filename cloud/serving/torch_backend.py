"""The CPU backend: plain torch, and the reference for every other backend.

A sequence whose blocks lie side by side is read as a view; otherwise its blocks are gathered once per layer. Decoding
rows of all query heads of one KV head form one small matrix, so grouped queries need no copy of keys or values; several
such sequences attend together (`decoding_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F

from cloud.serving.backend import Batch, SampledToken, SamplingRow, SequencePlan, Tensor
from cloud.serving.decoding_rows import DecodingRows, find_decoding
from cloud.serving.packed_linear import PackedWeight, pack, packed_linear
from cloud.serving.sampler import sample
from cloud.serving.wide_linear import MIN_ROWS, is_half_slow, wide_linear
from wire.errors import UnsupportedModelError


@dataclass
class CpuBatch(Batch):
    """Adds, per sequence, how its context is read: a slice of neighbouring blocks or an index tensor; and masks.

    `decoding` are the sequences of one new token, which attend together while they are short.
    """

    context: list[slice | Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    decoding: DecodingRows | None = None


class TorchBackend:
    """`Backend` on torch CPU operators, float32 or bfloat16. `is_widening`: multiply many bfloat16 rows in float32.

    `weight_bits` 8 or 4 keeps the weights of products in that many bits; activations must be bfloat16 then.
    """

    def __init__(self, is_widening: bool | None = None, weight_bits: int = 16) -> None:
        self.is_widening = is_half_slow() if is_widening is None else is_widening
        self.weight_bits = weight_bits

    def prepare_weight(self, weight: Tensor, *, is_head: bool = False) -> Tensor:
        """Contiguous rows are what torch's CPU products read fastest; or the packed form. A head keeps 8 bits."""
        if self.weight_bits == 16:
            return weight.contiguous()
        if weight.dim() != 2:
            raise UnsupportedModelError("the weights of experts cannot be packed", remedy="use --weight-bits 16")
        return self._pack(weight, 8 if is_head else self.weight_bits)

    def _pack(self, weight: Tensor, bits: int) -> Tensor:
        return pack(weight, bits)

    def plan(self, batch: Batch) -> CpuBatch:
        """Work out, once per step, how each context is read and which mask its new tokens need."""
        return CpuBatch(
            **batch.__dict__,
            context=[_find_context(plan) for plan in batch.sequences],
            masks=[_causal_mask(plan) for plan in batch.sequences],
            decoding=find_decoding(batch.sequences),
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.linear`."""
        if isinstance(weight, PackedWeight):
            return packed_linear(x, weight, bias)
        if not self._is_half(x) or not x.shape[0]:
            return F.linear(x, weight, bias)
        if x.shape[0] >= MIN_ROWS:
            return wide_linear(x, weight, bias)
        out = torch.mv(weight, x[0])[None]  # 3 % faster than the product of one row
        return out if bias is None else out.add_(bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Backend.rms_norm`."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Backend.add_rms_norm`."""
        residual += x
        return self.rms_norm(residual, weight, eps), residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Backend.silu_mul`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rotary(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Backend.rotary`."""
        half = heads.shape[-1] // 2
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        out = heads * cos
        out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(heads[..., :half], sin[..., half:])
        return out

    def write_kv(self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> None:
        """See `Backend.write_kv`."""
        k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, batch.slots, key)
        v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, batch.slots, value)

    def attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float) -> Tensor:
        """See `Backend.attend`."""
        assert isinstance(batch, CpuBatch)
        num_tokens, num_heads, head_dim = query.shape
        together = batch.decoding if batch.decoding is None or batch.decoding.is_worthwhile(k_cache) else None
        if together is not None and together.num_rows == num_tokens:
            return together.attend(query, k_cache, v_cache, scale).view(num_tokens, -1)
        out = torch.empty_like(query)
        if together is not None:
            out[together.rows] = together.attend(query[together.rows], k_cache, v_cache, scale)
        row = 0
        for plan, context, mask in zip(batch.sequences, batch.context, batch.masks, strict=True):
            rows = slice(row, row + plan.num_tokens)
            row += plan.num_tokens
            if together is None or plan.num_tokens > 1:
                key, value = (
                    cache[context].reshape(-1, *cache.shape[2:])[: plan.context_len].transpose(0, 1)[None]
                    for cache in (k_cache, v_cache)
                )  # [1, G, context, D]
                out[rows] = self._attend_alone(query[rows], key, value, mask, scale)
        return out.view(num_tokens, num_heads * head_dim)

    def _attend_alone(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """The new tokens of one sequence, [new, H, D], over its context."""
        if query.shape[0] == 1:
            q = query.view(1, key.shape[1], -1, query.shape[2])  # the heads of a KV head in the place of tokens
            return F.scaled_dot_product_attention(q, key, value, scale=scale).view(query.shape)
        q = query.transpose(0, 1)[None]  # [1, H, new, D]
        if self._is_half(query):
            q, key, value = q.float(), key.float(), value.float()
        answer = F.scaled_dot_product_attention(
            q, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return answer[0].transpose(0, 1)

    def _is_half(self, x: Tensor) -> bool:
        """Whether products of x are better made in float32."""
        return self.is_widening and x.dtype == torch.bfloat16 and x.device.type == "cpu"

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """See `Backend.sample`."""
        return sample(logits, rows)


def _find_context(plan: SequencePlan) -> slice | Tensor:
    blocks = plan.block_ids
    if blocks[-1] - blocks[0] == len(blocks) - 1 and all(b - a == 1 for a, b in pairwise(blocks)):
        return slice(blocks[0], blocks[-1] + 1)
    return torch.tensor(blocks, dtype=torch.int64)


def _causal_mask(plan: SequencePlan) -> Tensor | None:
    """True where a new token (row) may look at a context token (column); None when plain causal or unneeded."""
    if plan.num_tokens in (1, plan.context_len):
        return None
    offset = plan.context_len - plan.num_tokens
    return torch.ones(plan.num_tokens, plan.context_len, dtype=torch.bool).tril_(offset)
