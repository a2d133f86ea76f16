"""Qwen3-MoE: Qwen3 whose MLP is a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cloud.serving.models.config import read_config
from cloud.serving.models.decoder import DecoderConfig
from cloud.serving.models.experts import ExpertsConfig
from wire.errors import UnsupportedModelError

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def config_from(data: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` of this family describes."""
    if data.get("decoder_sparse_step", 1) != 1 or data.get("mlp_only_layers"):
        raise UnsupportedModelError(
            "decoder_sparse_step other than 1 and mlp_only_layers are not supported",
            remedy="use a model with experts in every layer",
        )
    has_bias = bool(data.get("attention_bias", False))
    config = read_config(
        {**data, "intermediate_size": data.get("moe_intermediate_size", 0)},
        family="qwen3_moe",
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
    num_experts = int(data.get("num_experts") or data.get("num_local_experts") or 0)
    top_k = int(data.get("num_experts_per_tok") or 0)
    if not 0 < top_k <= num_experts or config.intermediate_size <= 0:
        raise UnsupportedModelError(
            f"{top_k} of {num_experts} experts of width {config.intermediate_size} per token is not possible",
            remedy="check num_experts, num_experts_per_tok and moe_intermediate_size in config.json",
        )
    return replace(config, experts=ExpertsConfig(num_experts, top_k, bool(data.get("norm_topk_prob", False))))
