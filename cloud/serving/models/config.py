"""Reading a Hugging Face `config.json`: which family it is, and the decoder it describes.

Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling`, and `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloud.serving.models.decoder import DecoderConfig, RopeScaling
from wire.errors import UnsupportedModelError


def read_config(
    data: Mapping[str, Any],
    *,
    family: str,
    has_qkv_bias: bool = False,
    has_output_bias: bool = False,
    has_qk_norm: bool = False,
) -> DecoderConfig:
    """The shared fields of all families. Raises `UnsupportedModelError` for a missing or unsupported one."""
    if data.get("use_sliding_window"):
        raise UnsupportedModelError("sliding-window attention is not supported", remedy="use a full-attention model")
    if data.get("is_causal") is False or data.get("use_bidirectional_attention"):
        raise UnsupportedModelError("attention in both directions is not supported", remedy="use a causal decoder")
    if data.get("mlp_bias"):
        raise UnsupportedModelError("mlp_bias is not supported", remedy="use a model without MLP biases")
    if data.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"activation {data['hidden_act']!r} is not supported", remedy="only silu is")
    try:
        num_heads = int(data["num_attention_heads"])
        hidden_size = int(data["hidden_size"])
        rope = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
        return DecoderConfig(
            family=family,
            hidden_size=hidden_size,
            intermediate_size=int(data["intermediate_size"]),
            num_layers=int(data["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(data.get("num_key_value_heads") or num_heads),
            head_dim=int(data.get("head_dim") or hidden_size // num_heads),
            vocab_size=int(data["vocab_size"]),
            max_positions=int(data["max_position_embeddings"]),
            norm_eps=float(data["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta") or data.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope),
            has_tied_embeddings=bool(data.get("tie_word_embeddings", False)),
            has_qkv_bias=has_qkv_bias,
            has_output_bias=has_output_bias,
            has_qk_norm=has_qk_norm,
            eos_token_ids=_token_ids(data.get("eos_token_id")),
        )
    except KeyError as error:
        raise UnsupportedModelError(f"config.json has no {error.args[0]!r}", remedy="add it to config.json") from error


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedModelError(f"rotary scaling {kind!r} is not supported", remedy="supported: default, llama3")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def _token_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(token) for token in value) if isinstance(value, list) else frozenset((int(value),))
