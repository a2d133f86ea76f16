"""Sequences that decode on a CPU attend together: one gather and one attention per layer instead of one per sequence.

Pays while contexts are short, when calls cost more than copying keys and values. A sequence shorter than the longest
repeats its own first token and is masked there: no sequence ever reads what belongs to another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from cloud.serving.backend import SequencePlan, Tensor

MAX_GATHERED_BYTES = 1 << 20  # of keys: up to here faster than one by one for 2 to 8 KV heads, 8 rows, a Zen 3


class DecodingRows:
    """The sequences of a step with one new token each; `rows` are theirs in the batch."""

    def __init__(self, rows: list[int], plans: Sequence[SequencePlan]) -> None:
        self.rows = torch.tensor(rows)
        self.num_rows = len(rows)
        self._plans = plans
        self._longest = max(plan.context_len for plan in plans)
        self._slots: Tensor | None = None  # [S * longest]
        self._mask: Tensor | None = None  # [S, 1, 1, longest], True in the context; None where all are equally long

    def is_worthwhile(self, k_cache: Tensor) -> bool:
        """Whether copying these contexts costs less than reading them one by one where they are."""
        return self.num_rows * self._longest * k_cache.stride(1) * k_cache.itemsize <= MAX_GATHERED_BYTES

    def attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """query [S, H, D] over the contexts in a layer's caches [blocks, block_size, G, D]: [S, H, D]."""
        if self._slots is None:
            self._find_slots(k_cache.shape[1])
        num_kv_heads, head_dim = k_cache.shape[2:]
        key, value = (
            cache.view(-1, num_kv_heads, head_dim)
            .index_select(0, self._slots)
            .view(self.num_rows, -1, num_kv_heads, head_dim)
            .transpose(1, 2)
            for cache in (k_cache, v_cache)
        )  # [S, G, longest, D]
        q = query.view(self.num_rows, num_kv_heads, -1, head_dim)
        return F.scaled_dot_product_attention(q, key, value, attn_mask=self._mask, scale=scale).view(query.shape)

    def _find_slots(self, block_size: int) -> None:
        lengths = torch.tensor([plan.context_len for plan in self._plans])[:, None]
        longest = self._longest
        width = -(-longest // block_size)
        blocks = torch.tensor([[*plan.block_ids, *[0] * (width - len(plan.block_ids))] for plan in self._plans])
        slots = (blocks[..., None] * block_size + torch.arange(block_size)).flatten(1)[:, :longest]
        is_known = torch.arange(longest) < lengths
        self._slots = slots.where(is_known, slots[:, :1]).flatten()
        self._mask = None if is_known.all() else is_known[:, None, None]


def find_decoding(sequences: Sequence[SequencePlan]) -> DecodingRows | None:
    """The sequences of a step that may attend together; None when fewer than two decode."""
    rows, plans, row = [], [], 0
    for plan in sequences:
        if plan.num_tokens == 1:
            rows.append(row)
            plans.append(plan)
        row += plan.num_tokens
    return DecodingRows(rows, plans) if len(plans) > 1 else None
