"""A decoder as the loop sees it: rows that hold streams, a prefill of one row, one decode step of the first rows.

A prompt is read in chunks, and only the last one computes logits: over 512 tokens of a vocabulary of 49,152 they alone
would be 100 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import onnxruntime

from edge_agent.runtimes.adapters import read_adapters
from edge_agent.runtimes.base import Array
from edge_agent.runtimes.decoder_names import MASK, POSITIONS, TOKENS, past_names
from edge_agent.runtimes.growing_graph import GrowingGraph
from edge_agent.runtimes.language_settings import LanguageSettings
from edge_agent.runtimes.shared_graph import SharedGraph
from edge_agent.thrift import use_one_heap
from wire.errors import UnsupportedModelError


class NoPlainDecoderError(UnsupportedModelError):
    """The graph wants more than tokens and a cache."""


class DecoderGraph(Protocol):
    """What the loop asks of a graph. Not thread-safe: one thread calls it."""

    num_rows: int
    token_bytes: int
    has_hidden_states: bool

    def prefill(self, row: int, tokens: Sequence[int], num_past: int, stop: Any = None) -> None:
        """Read tokens into a row's cache without computing logits; `stop` is a `RunOptions` that may end it early."""

    def score(self, row: int, tokens: Sequence[int], num_past: int) -> Array:
        """Read tokens and return logits [num_tokens, vocabulary]."""

    def hidden(self, row: int, tokens: Sequence[int]) -> Array:
        """Hidden states [num_tokens, hidden size] of a text."""

    def decode(self, tokens: Sequence[int], num_past: Sequence[int]) -> Array:
        """One token of each of the first rows: logits [num_rows, vocabulary], valid until the next call."""

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """A stream's cache takes another row."""

    def free(self, row: int) -> None:
        """The row's stream has left."""


def open_session(settings: LanguageSettings, num_threads: int) -> Any:
    """The graph on the CPU; raises `UnsupportedModelError`.

    ONNX Runtime's arena is off: it would keep what the longest prompt needed for as long as the model is loaded. The
    heap keeps it, too, but gives it back when the streams have ended.
    """
    use_one_heap()
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(settings.graph_file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedModelError(f"the model does not load: {error}", remedy="compile it for this device") from error


def make_graph(session: Any, settings: LanguageSettings, num_rows: int, context_tokens: int) -> DecoderGraph:
    """The way to run `session` that fits it; raises `NoPlainDecoderError` where none does."""
    names = {value.name for value in session.get_inputs()}
    unknown = sorted(names - {TOKENS, MASK, POSITIONS} - set(past_names(settings)))
    if unknown or not set(past_names(settings)) <= names:
        raise NoPlainDecoderError(
            f"the graph is no plain decoder: inputs {', '.join(unknown) or 'without a cache'}",
            remedy="export it with explicit keys and values, or build it for ONNX Runtime GenAI",
        )
    extra = read_adapters(settings.graph_file.parent, session)
    if settings.shares_buffer and POSITIONS not in names and MASK in names:
        return SharedGraph(session, settings, num_rows, context_tokens, extra)
    return GrowingGraph(session, settings, num_rows, extra)
