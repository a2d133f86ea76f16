"""A mixture of experts in place of the MLP, for any backend: the plain form that the fused ones are held against.

Routing is in float32: softmax over all experts, then the largest, as in Hugging Face's Qwen3-MoE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cloud.serving.backend import Backend, Tensor

if TYPE_CHECKING:
    from cloud.serving.models.decoder import LayerWeights


@dataclass(frozen=True)
class ExpertsConfig:
    """How many experts a layer has, how many of them see a token, and whether the chosen weights sum to one."""

    num_experts: int
    top_k: int
    is_renormalised: bool


def mix_experts(x: Tensor, layer: LayerWeights, config: ExpertsConfig, backend: Backend) -> Tensor:
    """The layer's experts on x [T, hidden]; `gate_up` and `down` are stacked along experts."""
    scores = backend.linear(x, layer.router).float().softmax(dim=-1)
    weights, experts = scores.topk(config.top_k, dim=-1)
    if config.is_renormalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        rows, choices = (experts == expert).nonzero(as_tuple=True)
        inner = backend.silu_mul(backend.linear(x[rows], layer.gate_up[expert]))
        scaled = backend.linear(inner, layer.down[expert]) * weights[rows, choices, None].to(x.dtype)
        out.index_add_(0, rows, scaled)
    return out
