"""Answers that must match a JSON schema: before each draw, the tokens that keep the text a prefix of a valid document.

The grammar's automaton is llguidance's (optional extra `guided`); this file owns when it is asked. A guide belongs to
one request and follows its output. A request that is resumed elsewhere replays the tokens it has, so the mask is the
one an undisturbed worker would use. When the document is complete only end-of-sequence is left. Whitespace between
values is short, or a model that likes it would never come to an end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wire.errors import InvalidInputError, MissingExtraError

MAX_SCHEMA_CHARS = 1 << 16
WHITESPACE = r"[ \n]{0,4}"


class Guide:
    """The automaton of one request."""

    def __init__(self, matcher: Any, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = sorted(eos_token_ids)
        self._num_consumed = 0

    def restrict(self, logits: Any, output_token_ids: Sequence[int]) -> Any:
        """Logits [vocab] with every token at minus infinity that cannot follow the output so far."""
        new = list(output_token_ids[self._num_consumed :])
        self._num_consumed = len(output_token_ids)
        if new:
            self._matcher.try_consume_tokens(new)
        is_allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
        if not self._matcher.is_stopped():
            words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
            bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            is_allowed |= bits.flatten()[: logits.shape[-1]].bool()
        if self._matcher.is_accepting() or not is_allowed.any():
            is_allowed[self._eos_token_ids] = True
        return logits.masked_fill(~is_allowed.to(logits.device), float("-inf"))


class Guides:
    """Makes guides for one model; reads its tokenizer at first use."""

    def __init__(self, model: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.model = model
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: Any = None

    def make(self, json_schema: str) -> Guide:
        """A guide for a schema given as JSON text; raises `InvalidInputError` for one that cannot be followed."""
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtraError("llguidance", "guided") from error
        if len(json_schema) > MAX_SCHEMA_CHARS:
            raise InvalidInputError(
                f"the JSON schema has {len(json_schema)} characters",
                remedy=f"use at most {MAX_SCHEMA_CHARS}",
                param="response_format",
            )
        if not self._eos_token_ids:
            raise InvalidInputError("this model names no end-of-sequence token", remedy="leave response_format out")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.loads(json_schema), overrides={"whitespace_pattern": WHITESPACE}
            )
            matcher = llguidance.LLMatcher(self._read_tokenizer(llguidance), grammar)
        except ValueError as error:
            raise _refusal(str(error)) from error
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return Guide(matcher, self._eos_token_ids)

    def _read_tokenizer(self, llguidance: Any) -> Any:
        if self._tokenizer is None:
            text = (self.model / "tokenizer.json").read_text(encoding="utf-8")
            self._tokenizer = llguidance.LLTokenizer(
                text, n_vocab=self._vocab_size, eos_token=sorted(self._eos_token_ids)
            )
        return self._tokenizer


def _refusal(reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"the JSON schema cannot be followed: {reason.splitlines()[0]}",
        remedy="correct the schema, or leave response_format out",
        param="response_format",
    )
