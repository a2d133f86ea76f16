"""Decoder graphs whose attention writes into its own past (GroupQueryAttention, from ONNX Runtime GenAI's builder).

Rows of different lengths decode in one call, because the attention mask tells each row's length (the kernel takes it
from there, and rotary positions with it). A set of rows is bound once: its caches lie where they always lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_agent.runtimes.base import Array
from edge_agent.runtimes.decoder_names import (
    DTYPE_BY_ONNX,
    HIDDEN,
    LOGITS,
    MASK,
    TOKENS,
    kv_shape,
    past_names,
    present_names,
    without_logits,
)
from edge_agent.runtimes.kv_rows import KvRows
from edge_agent.runtimes.language_settings import LanguageSettings


class SharedGraph:
    """Past and present are the same rows."""

    def __init__(
        self,
        session: Any,
        settings: LanguageSettings,
        num_rows: int,
        context_tokens: int,
        extra: Mapping[str, Array],
    ) -> None:
        self._session, self._extra = session, extra
        self._present_by_past = dict(zip(past_names(settings), present_names(settings), strict=True))
        self._rows = KvRows(past_names(settings), kv_shape(session, settings), num_rows, context_tokens)
        outputs = {value.name: value for value in session.get_outputs()}
        self.has_hidden_states = HIDDEN in outputs
        self._dtype = np.dtype(DTYPE_BY_ONNX[outputs[LOGITS].type])
        self._vocabulary_size = settings.vocabulary_size
        self._binding_by_rows: dict[tuple[int, int, str | None], Any] = {}
        self.num_rows, self.token_bytes = num_rows, self._rows.token_bytes

    def prefill(self, row: int, tokens: Sequence[int], num_past: int, stop: Any = None) -> None:
        """Read tokens into a row's cache; nodes that only logits need do not run."""
        options = without_logits(stop)
        self._run(row, np.asarray([tokens], np.int64), [num_past], options)

    def score(self, row: int, tokens: Sequence[int], num_past: int) -> Array:
        """Logits [num_tokens, vocabulary]."""
        shape = (1, len(tokens), self._vocabulary_size)
        return self._run(row, np.asarray([tokens], np.int64), [num_past], None, LOGITS, shape)[0]

    def hidden(self, row: int, tokens: Sequence[int]) -> Array:
        """Hidden states [num_tokens, hidden size]."""
        size = next(int(value.shape[-1]) for value in self._session.get_outputs() if value.name == HIDDEN)
        return self._run(row, np.asarray([tokens], np.int64), [0], without_logits(), HIDDEN, (1, len(tokens), size))[0]

    def decode(self, tokens: Sequence[int], num_past: Sequence[int]) -> Array:
        """Logits [num_rows, vocabulary]."""
        shape = (len(tokens), 1, self._vocabulary_size)
        return self._run(0, np.asarray(tokens, np.int64)[:, None], num_past, None, LOGITS, shape)[:, 0]

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row."""
        self._rows.move(source, target, num_tokens)

    def free(self, row: int) -> None:
        """Give a row's memory back."""
        self._rows.free(row)

    def _run(
        self,
        row: int,
        tokens: Array,  # [rows, length]
        num_past: Sequence[int],
        options: Any,
        output: str | None = None,
        shape: tuple[int, ...] = (),
    ) -> Array:
        lengths = np.asarray(num_past) + tokens.shape[1]
        mask = (np.arange(int(lengths.max()))[None] < lengths[:, None]).astype(np.int64)  # [rows, longest]
        binding = self._bound(row, len(tokens), output)
        binding.bind_cpu_input(TOKENS, tokens)
        binding.bind_cpu_input(MASK, mask)
        result = np.empty(shape, self._dtype)
        if output is not None:
            binding.bind_output(output, "cpu", 0, self._dtype, shape, result.ctypes.data)
        self._session.run_with_iobinding(binding, options)
        return result

    def _bound(self, row: int, num_rows: int, output: str | None) -> Any:
        """The binding of rows `row`.. whose caches lie where they always lie."""
        key = (row, num_rows, output)
        if key not in self._binding_by_rows:
            binding = self._session.io_binding()
            shape = (num_rows, self._rows.shape.num_heads, self._rows.capacity, self._rows.shape.head_size)
            dtype = np.dtype(self._rows.shape.dtype)
            for name, value in self._extra.items():
                binding.bind_cpu_input(name, value)
            for past, present in self._present_by_past.items():
                pointer = self._rows.pointer(past, row)
                binding.bind_input(past, "cpu", 0, dtype, shape, pointer)
                binding.bind_output(present, "cpu", 0, dtype, shape, pointer)
            self._binding_by_rows[key] = binding
        return self._binding_by_rows[key]
