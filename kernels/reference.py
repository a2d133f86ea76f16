"""What every kernel here must compute, in plain torch: the truth of the tests and the benchmarks.

Each function works in the dtype of its floating-point inputs, so a test that wants float64 truth upcasts and calls.
Slow and obvious on purpose: loops over sequences, no fusion, no in-place tricks. Never used to serve a request.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_sequence(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first `length` rows of one sequence out of a paged cache.

    cache [num_blocks, block_size, num_kv_heads, head_dim], block_table [max_blocks] -> [length, num_kv_heads, head_dim]
    """
    block_size = cache.shape[1]
    num_blocks = -(-length // block_size)
    return cache[block_table[:num_blocks].long()].flatten(0, 1)[:length]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of the last query tokens of each sequence over its whole paged context.

    q [num_tokens, num_heads, head_dim]; sequence i owns rows query_starts[i]:query_starts[i + 1], which are the last
    positions of its context of context_lens[i] tokens. Query head h reads KV head h // (num_heads // num_kv_heads).
    """
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[2]
    starts = query_starts.tolist()
    for i, length in enumerate(context_lens.tolist()):
        rows = q[starts[i] : starts[i + 1]]
        if length == 0 or rows.shape[0] == 0:
            continue
        k = gather_sequence(k_cache, block_tables[i], length).to(q.dtype).repeat_interleave(group, dim=1)
        v = gather_sequence(v_cache, block_tables[i], length).to(q.dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", rows, k) * scale
        position = torch.arange(length - rows.shape[0], length, device=q.device)
        future = torch.arange(length, device=q.device)[None, :] > position[:, None]
        weights = scores.masked_fill(future[None], float("-inf")).softmax(dim=-1)
        out[starts[i] : starts[i + 1]] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (arXiv:1910.07467)."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with gate_up [..., 2 * width] holding gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rotary(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split ("neox") form of Hugging Face's Llama (arXiv:2104.09864).

    x [num_tokens, heads, head_dim], positions [num_tokens], cos_sin [max_position, head_dim]: cos, then sin.
    """
    half = x.shape[-1] // 2
    table = cos_sin[positions.long()].to(x.dtype)
    cos, sin = table[:, None, :half], table[:, None, half:]
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def write_kv(cache: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """A copy of `cache` with values [num_tokens, num_kv_heads, head_dim] at flat `slots`, negative ones skipped."""
    out = cache.clone()
    kept = slots >= 0
    block_size = cache.shape[1]
    chosen = slots[kept].long()
    out[chosen // block_size, chosen % block_size] = values[kept].to(cache.dtype)
    return out


def penalised(
    logits: Tensor, output_counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Logits after repetition (CTRL, arXiv:1909.05858), presence and frequency penalties (OpenAI's definition).

    logits [rows, vocab]; output_counts [rows, vocab] of tokens generated so far; in_prompt [rows, vocab] bool.
    """
    seen = (output_counts > 0) | in_prompt
    factor = repetition[:, None].to(logits.dtype)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    out = torch.where(seen, repeated, logits)
    out = out - frequency[:, None].to(logits.dtype) * output_counts.to(logits.dtype)
    return out - presence[:, None].to(logits.dtype) * (output_counts > 0).to(logits.dtype)


def kept_by_filters(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which of one row's tokens may be drawn: top-k, then top-p among those, then min-p (all relative to the maximum).

    Ties at a threshold are kept, so that the answer does not depend on an order of equal values.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.numel():
        keep &= logits >= logits.topk(top_k).values[-1]
    if top_p < 1.0:
        probabilities = logits.masked_fill(~keep, float("-inf")).softmax(dim=-1)
        ordered = probabilities.sort(descending=True).values
        mass_before = ordered.cumsum(0) - ordered
        threshold = ordered[mass_before < top_p][-1]
        keep &= probabilities >= threshold
    if min_p > 0.0:
        probabilities = logits.softmax(dim=-1)
        keep &= probabilities >= min_p * probabilities.max()
    return keep


def dequantised(packed: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """Weights [out, in] from int8 [out, in], or from int4 pairs [out, in / 2] (low nibble = even column, offset 8)."""
    if bits == 8:
        values = packed.to(scales.dtype)
    else:
        low = (packed.to(torch.int16) & 0xF) - 8
        high = ((packed.to(torch.int16) >> 4) & 0xF) - 8
        values = torch.stack((low, high), dim=-1).flatten(-2).to(scales.dtype)
    return values * scales.repeat_interleave(group_size, dim=-1)


def moe_routing(router_logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """(weights, experts), both [num_tokens, top_k]: softmax over all experts, then the k largest."""
    weights, experts = router_logits.softmax(dim=-1).topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


def moe_mlp(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Mixture of SwiGLU experts: x [tokens, hidden], gate_up [E, 2 * width, hidden], down [E, hidden, width]."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        if token.numel():
            hidden = silu_mul(x[token] @ gate_up[expert].T)
            out.index_add_(0, token, (hidden @ down[expert].T) * weights[token, choice, None].to(x.dtype))
    return out
