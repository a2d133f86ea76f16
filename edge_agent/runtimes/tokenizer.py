"""Text to token ids and back, from a model's folder: ONNX Runtime GenAI's tokenizer, without the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

from wire.errors import InvalidInputError, UnsupportedModelError


class Tokenizer:
    """The tokenizer of one model."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Any = genai.Tokenizer(str(folder))
        except Exception as error:
            raise UnsupportedModelError(f"the tokenizer does not load: {error}", remedy="compile it again") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's template, ready for the answer."""
        try:
            text = self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        except Exception as error:
            raise InvalidInputError(f"the chat template refuses this: {error}", remedy="use /v1/completions") from error
        return self.encode(text)

    def stream(self) -> Any:
        """A detokenizer for one stream."""
        return self._tokenizer.create_stream()


def check_length(prompt: Sequence[int], max_tokens: int, context_tokens: int) -> None:
    """Raise `InvalidInputError` for a prompt that is empty or too long."""
    if not prompt:
        raise InvalidInputError("the prompt is empty", remedy="send some text")
    if len(prompt) + max_tokens > context_tokens:
        raise InvalidInputError(
            f"{len(prompt)} prompt and {max_tokens} new tokens exceed {context_tokens}",
            remedy="send a shorter prompt or a lower max_tokens",
        )
