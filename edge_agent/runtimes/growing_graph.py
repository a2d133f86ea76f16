"""Any decoder graph with explicit keys and values in and out, as `torch.onnx.export` writes it.

Every call returns a longer cache; rows decode one after the other, since their caches have different lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_agent.runtimes.base import Array
from edge_agent.runtimes.decoder_names import (
    HIDDEN,
    LOGITS,
    MASK,
    POSITIONS,
    TOKENS,
    kv_shape,
    past_names,
    present_names,
    without_logits,
)
from edge_agent.runtimes.language_settings import LanguageSettings


class GrowingGraph:
    """Every row has arrays of its own that each call replaces."""

    def __init__(self, session: Any, settings: LanguageSettings, num_rows: int, extra: Mapping[str, Array]) -> None:
        self._session, self._extra = session, extra
        self._past, self._present = past_names(settings), present_names(settings)
        shape = kv_shape(session, settings)
        self._empty = np.zeros((1, shape.num_heads, 0, shape.head_size), shape.dtype)
        self._cache_by_row: dict[int, list[Array]] = {}
        self._inputs = {value.name for value in session.get_inputs()}
        self.has_hidden_states = HIDDEN in {value.name for value in session.get_outputs()}
        self.num_rows, self.token_bytes = num_rows, shape.token_bytes * len(self._past)

    def prefill(self, row: int, tokens: Sequence[int], num_past: int, stop: Any = None) -> None:
        """Read tokens; nodes that only logits need do not run."""
        self._run(row, tokens, num_past, [], without_logits(stop))

    def score(self, row: int, tokens: Sequence[int], num_past: int) -> Array:
        """Logits [num_tokens, vocabulary]."""
        return self._run(row, tokens, num_past, [LOGITS])[0][0]

    def hidden(self, row: int, tokens: Sequence[int]) -> Array:
        """Hidden states [num_tokens, hidden size]."""
        return self._run(row, tokens, 0, [HIDDEN], without_logits())[0][0]

    def decode(self, tokens: Sequence[int], num_past: Sequence[int]) -> Array:
        """Logits [num_rows, vocabulary], row by row: their caches have different lengths."""
        pairs = enumerate(zip(tokens, num_past, strict=True))
        return np.concatenate([self.score(row, [token], past) for row, (token, past) in pairs])

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """The arrays change hands."""
        self._cache_by_row[target] = self._cache_by_row.pop(source)

    def free(self, row: int) -> None:
        """Forget the row's arrays."""
        self._cache_by_row.pop(row, None)

    def _run(
        self, row: int, tokens: Sequence[int], num_past: int, outputs: list[str], options: Any = None
    ) -> list[Array]:
        past = self._cache_by_row[row] if num_past else [self._empty] * len(self._past)
        feeds = dict(zip(self._past, past, strict=True)) | {TOKENS: np.asarray([tokens], np.int64), **self._extra}
        if MASK in self._inputs:
            feeds[MASK] = np.ones((1, num_past + len(tokens)), np.int64)
        if POSITIONS in self._inputs:
            feeds[POSITIONS] = np.arange(num_past, num_past + len(tokens), dtype=np.int64)[None]
        results = self._session.run([*outputs, *self._present], feeds, options)
        self._cache_by_row[row] = results[len(outputs) :]
        return list(results[: len(outputs)])
