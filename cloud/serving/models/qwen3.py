"""Qwen3 (dense): Llama with a norm on each query and key head and a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloud.serving.models.config import read_config
from cloud.serving.models.decoder import DecoderConfig

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3Model")


def config_from(data: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` of this family describes."""
    has_bias = bool(data.get("attention_bias", False))
    return read_config(data, family="qwen3", has_qk_norm=True, has_qkv_bias=has_bias, has_output_bias=has_bias)
