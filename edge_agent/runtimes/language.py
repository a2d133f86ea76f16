"""Which runtime runs a language model: our loop for plain decoders on the CPU, ONNX Runtime GenAI for the rest."""

from __future__ import annotations

import contextlib
from pathlib import Path

from edge_agent.runtimes.base import LanguageLimits, LanguageRuntime
from edge_agent.runtimes.decoder_graph import NoPlainDecoderError
from edge_agent.runtimes.genai_language import GenaiLanguage
from edge_agent.runtimes.language_settings import read_settings
from edge_agent.runtimes.onnx_language import OnnxLanguage


def load_language(folder: Path, limits: LanguageLimits) -> LanguageRuntime:
    """Load the model in `folder`; raises `UnsupportedModelError`."""
    settings = read_settings(folder)
    if settings.is_for_cpu:
        with contextlib.suppress(NoPlainDecoderError):
            return OnnxLanguage(folder, settings, limits)
    return GenaiLanguage(folder, settings, limits)
