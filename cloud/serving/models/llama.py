"""Llama 2 and 3 and their kin (SmolLM2, TinyLlama): grouped queries, SiLU MLP, no biases unless the config asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloud.serving.models.config import read_config
from cloud.serving.models.decoder import DecoderConfig

ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")


def config_from(data: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` of this family describes."""
    has_bias = bool(data.get("attention_bias", False))
    return read_config(data, family="llama", has_qkv_bias=has_bias, has_output_bias=has_bias)
