"""Which runtime runs a language model: the one that its manifest names, as the compiler chose it; without a choice our
loop for plain decoders on the CPU, ONNX Runtime GenAI for the rest.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from edge_agent.runtimes.base import LanguageLimits, LanguageRuntime
from edge_agent.runtimes.decoder_graph import NoPlainDecoderError
from edge_agent.runtimes.language_settings import read_settings
from edge_agent.runtimes.onnx_language import OnnxLanguage
from model_registry.manifest import ChosenRuntime
from wire.errors import UnsupportedModelError

LANGUAGE_RUNTIMES = ("onnxruntime", "onnxruntime-genai")
"""Our loop, and ONNX Runtime GenAI."""


def load_language(folder: Path, limits: LanguageLimits, choice: ChosenRuntime | None = None) -> LanguageRuntime:
    """Load the model in `folder` with the runtime that the artefact's compiler chose, else with the one that suits.

    Raises `UnsupportedModelError`, also where the chosen one does not run the model.
    """
    settings = read_settings(folder)
    if choice not in (None, *LANGUAGE_RUNTIMES):
        raise UnsupportedModelError(f"{choice} runs no language models here", remedy="compile with runtime: auto")
    if choice == "onnxruntime" and not settings.is_for_cpu:
        raise UnsupportedModelError("onnxruntime was chosen for a graph of a GPU", remedy="compile with runtime: auto")
    if choice == "onnxruntime":
        return OnnxLanguage(folder, settings, limits)
    if choice is None and settings.is_for_cpu:
        with contextlib.suppress(NoPlainDecoderError):
            return OnnxLanguage(folder, settings, limits)
    from edge_agent.runtimes.genai_language import GenaiLanguage  # brings another ONNX Runtime: megabytes for nothing

    return GenaiLanguage(folder, settings, limits)
