"""Answers that must be JSON, or match a JSON schema: before each choice, the tokens that can follow.

The grammar's automaton is llguidance's (optional extra `guided`). When the document is complete only end-of-sequence is
left. Whitespace between values is short, or a model that likes it would never come to an end. The automaton reads the
vocabulary of the tokenizer that is here already; only where its decoder is of an unknown kind it loads one of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_agent.runtimes.base import Array
from model_registry.chat_tokenizer import ChatTokenizer
from wire.errors import InvalidInputError, MissingExtraError

MAX_SCHEMA_CHARS = 1 << 16
WHITESPACE = r"[ \n]{0,4}"


class JsonGuide:
    """The automaton of one stream."""

    def __init__(self, matcher: Any, eos_tokens: Sequence[int]) -> None:
        self._matcher = matcher
        self._eos_tokens = list(eos_tokens)

    def restrict(self, logits: Array) -> Array:
        """A copy of logits [vocabulary] with every token at minus infinity that cannot follow."""
        is_allowed = np.zeros(len(logits), np.bool_)
        if not self._matcher.is_stopped():
            words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            is_allowed |= np.unpackbits(words, bitorder="little")[: len(logits)].astype(np.bool_)
        if self._matcher.is_accepting() or not is_allowed.any():
            is_allowed[self._eos_tokens] = True
        return np.where(is_allowed, logits, -np.inf)

    def consume(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.try_consume_tokens([token])


class JsonGuides:
    """Makes guides for one model; indexes its vocabulary at first use."""

    def __init__(self, tokenizer: ChatTokenizer, vocabulary_size: int, eos_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._eos_tokens = sorted(eos_tokens)
        self._index: Any = None

    def make(self, schema: str) -> JsonGuide:
        """A guide for a schema as JSON text (`{}`: any object); raises `InvalidInputError` for one it cannot follow."""
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtraError("llguidance", "guided") from error
        if len(schema) > MAX_SCHEMA_CHARS:
            raise _refusal(f"it has {len(schema)} characters, at most {MAX_SCHEMA_CHARS}")
        if not self._eos_tokens:
            raise _refusal("the model names no end-of-sequence token")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.loads(schema), overrides={"whitespace_pattern": WHITESPACE}
            )
            matcher = llguidance.LLMatcher(self.read_vocabulary(), grammar)
        except ValueError as error:
            raise _refusal(str(error)) from error
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return JsonGuide(matcher, self._eos_tokens)

    def read_vocabulary(self) -> Any:
        """llguidance's index of the vocabulary, made once."""
        import llguidance

        if self._index is None:
            names = self._tokenizer.find_token_bytes(self._vocabulary_size)
            options: dict[str, Any] = {"n_vocab": self._vocabulary_size, "eos_token": self._eos_tokens}
            if names is None:
                self._index = llguidance.LLTokenizer(self._tokenizer.to_json(), **options)
            else:
                wrapper = llguidance.TokenizerWrapper(_Vocabulary(names, self._eos_tokens[0], self._tokenizer))
                self._index = llguidance.LLTokenizer(wrapper, **options)
                names.clear()  # the index has them now
        return self._index


class _Vocabulary:
    """A tokenizer as llguidance wants it; special tokens are marked in `tokens`."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos_token: int, tokenizer: ChatTokenizer) -> None:
        self.tokens, self.eos_token_id, self._tokenizer = tokens, eos_token, tokenizer

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text that the grammar forces."""
        return self._tokenizer.encode(text, add_special_tokens=False)


def _refusal(reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"the JSON schema cannot be followed: {reason.splitlines()[0]}",
        remedy="correct the schema, or leave response_format out",
    )
