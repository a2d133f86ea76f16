"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloud.serving.models.config import read_config
from cloud.serving.models.decoder import DecoderConfig

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2Model")


def config_from(data: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` of this family describes."""
    return read_config(data, family="qwen2", has_qkv_bias=True)
