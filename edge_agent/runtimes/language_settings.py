"""What the folder of a language model says about itself: `genai_config.json`, written by the builder for ONNX Runtime
GenAI and, in the same words, beside graphs of other exporters.

Every shape that the loop needs comes from the graph; from here come names, token ids and how the cache may be bound.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wire.errors import UnsupportedModelError

FILE = "genai_config.json"
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class LanguageSettings:
    """One model."""

    graph_file: Path
    context_tokens: int
    vocabulary_size: int
    eos_tokens: frozenset[int]
    past_keys: str  # names of the graph's inputs and outputs, with %d for the layer
    past_values: str
    present_keys: str
    present_values: str
    num_layers: int
    head_size: int  # 0: the graph tells
    shares_buffer: bool  # past and present may be one buffer
    is_for_cpu: bool


def read_settings(folder: Path) -> LanguageSettings:
    """The settings of the model in `folder`; raises `UnsupportedModelError`."""
    path = folder / FILE
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnsupportedModelError(f"{FILE} has {path.stat().st_size} bytes", remedy="compile the model again")
        return _parse(json.loads(path.read_text()), folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(f"{FILE} cannot be read: {error!r}", remedy="compile the model again") from error


def _parse(document: dict[str, Any], folder: Path) -> LanguageSettings:
    model, search = document["model"], document.get("search", {})
    decoder = model["decoder"]
    inputs, outputs = decoder.get("inputs", {}), decoder.get("outputs", {})
    eos = model.get("eos_token_id", [])
    return LanguageSettings(
        graph_file=folder / str(decoder["filename"]),
        context_tokens=int(model["context_length"]),
        vocabulary_size=int(model["vocab_size"]),
        eos_tokens=frozenset(int(token) for token in (eos if isinstance(eos, list) else [eos])),
        past_keys=str(inputs.get("past_key_names", "past_key_values.%d.key")),
        past_values=str(inputs.get("past_value_names", "past_key_values.%d.value")),
        present_keys=str(outputs.get("present_key_names", "present.%d.key")),
        present_values=str(outputs.get("present_value_names", "present.%d.value")),
        num_layers=int(decoder["num_hidden_layers"]),
        head_size=int(decoder.get("head_size", 0)),
        shares_buffer=bool(search.get("past_present_share_buffer", False)),
        is_for_cpu=not decoder.get("session_options", {}).get("provider_options"),
    )
