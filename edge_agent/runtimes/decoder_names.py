"""Inputs and outputs of a decoder graph: their names, and the shape of its cache as the graph states it."""

from __future__ import annotations

from typing import Any

import onnxruntime

from edge_agent.runtimes.kv_rows import KvShape
from edge_agent.runtimes.language_settings import LanguageSettings
from wire.errors import UnsupportedModelError

TOKENS, MASK, POSITIONS, LOGITS, HIDDEN = "input_ids", "attention_mask", "position_ids", "logits", "hidden_states"
DTYPE_BY_ONNX = {"tensor(float)": "float32", "tensor(float16)": "float16"}


def kv_shape(session: Any, settings: LanguageSettings) -> KvShape:
    name = settings.past_keys % 0
    value = next(value for value in session.get_inputs() if value.name == name)
    out = next(value for value in session.get_outputs() if value.name == settings.present_keys % 0)
    heads, size = value.shape[1], value.shape[3]
    if not isinstance(size, int):
        size = out.shape[3] if isinstance(out.shape[3], int) else settings.head_size
    if value.type not in DTYPE_BY_ONNX or not isinstance(heads, int) or not size:
        raise UnsupportedModelError(
            f"the cache {name!r} is {value.type} {value.shape}", remedy="export heads and head size as fixed numbers"
        )
    return KvShape(heads, size, DTYPE_BY_ONNX[value.type])


def past_names(settings: LanguageSettings) -> list[str]:
    return [name % layer for layer in range(settings.num_layers) for name in (settings.past_keys, settings.past_values)]


def present_names(settings: LanguageSettings) -> list[str]:
    pairs = (settings.present_keys, settings.present_values)
    return [name % layer for layer in range(settings.num_layers) for name in pairs]


def without_logits(options: Any = None) -> Any:
    """Run options under which nodes that nobody fetches from do not run."""
    options = options if options is not None else onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    return options
