"""Text of one answer on its way out: no half characters, nothing of or after a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from model_registry.chat_tokenizer import ChatTokenizer


class TextStream:
    """`push` returns what can be shown now; `flush` the rest. Once `is_stopped`, nothing more comes."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str] = ()) -> None:
        self._tokens = tokenizer.stream()
        self._stops = [stop for stop in stops if stop]
        self._pending = ""  # decoded, but possibly the beginning of a stop string
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Take in the next token."""
        return "" if self.is_stopped else self._release(self._tokens.decode(token_id))

    def flush(self) -> str:
        """The end of the answer: whatever was held back."""
        if self.is_stopped:
            return ""
        text = self._release(self._tokens.flush())
        if not self.is_stopped:
            text, self._pending = text + self._pending, ""
        return text

    def _release(self, new: str) -> str:
        text = self._pending + new
        found = [position for position in (text.find(stop) for stop in self._stops) if position >= 0]
        if found:
            self.is_stopped = True
            self._pending = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
