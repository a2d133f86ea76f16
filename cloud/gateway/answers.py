"""OpenAI's answer objects, built from pieces of text and what the engine reported. Plain functions, plain data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloud.gateway.generation import Outcome
from model_registry.chat_tokenizer import ChatTokenizer
from wire.embeddings import EmbeddingRequest, embedding_list, embedding_object
from wire.errors import ForeshoreError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Piece:
    """What one token added to a choice; `finish_reason` only on the last piece."""

    index: int
    text: str
    tokens: tuple[Any, ...] = ()  # engine tokens, kept for log probabilities
    finish_reason: str | None = None


@dataclass(frozen=True)
class Frame:
    """What all objects of one answer share."""

    kind: str  # "chat.completion" or "text_completion"
    answer_id: str
    created: int
    model: str
    tokenizer: ChatTokenizer
    wants_logprobs: bool

    def _object(self, suffix: str = "") -> dict[str, Any]:
        kind = f"{self.kind}{suffix}" if self.kind == "chat.completion" else self.kind
        return {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model}

    def chunk(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        """One streamed chunk."""
        choice: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish_reason}
        choice["logprobs"] = self.logprobs(piece.tokens)
        if self.kind == "chat.completion":
            choice["delta"] = {"role": "assistant"} if is_first else {}
            if piece.text or is_first:
                choice["delta"]["content"] = piece.text
        else:
            choice["text"] = piece.text
        return {**self._object(".chunk"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any], foreshore: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that asked for usage."""
        return {**self._object(".chunk"), "choices": [], "usage": usage, "foreshore": foreshore}

    def whole(
        self, choices: Sequence[Sequence[Piece]], usage: dict[str, Any], foreshore: dict[str, Any]
    ) -> dict[str, Any]:
        """The body of an answer that was not streamed."""
        return {
            **self._object(),
            "choices": [self._choice(index, pieces) for index, pieces in enumerate(choices)],
            "usage": usage,
            "foreshore": foreshore,
        }

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        choice: dict[str, Any] = {"index": index, "finish_reason": pieces[-1].finish_reason if pieces else "stop"}
        choice["logprobs"] = self.logprobs([token for piece in pieces for token in piece.tokens])
        if self.kind == "chat.completion":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice

    def logprobs(self, tokens: Sequence[Any]) -> dict[str, Any] | None:
        """Log probabilities in the route's own format; None when they were not asked for."""
        if not self.wants_logprobs or not tokens:
            return None
        if self.kind == "chat.completion":
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        texts = [self.tokenizer.token_text(token.token_id) for token in tokens]
        offsets = [sum(len(text) for text in texts[:i]) for i in range(len(texts))]
        tops = [{self.tokenizer.token_text(t.token_id): t.logprob for t in token.top} for token in tokens]
        logprobs = [token.logprob for token in tokens]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _chat_logprob(self, token: Any) -> dict[str, Any]:
        top = [self._entry(item) for item in token.top]
        return {**self._entry(token), "top_logprobs": top}

    def _entry(self, token: Any) -> dict[str, Any]:
        text = self.tokenizer.token_text(token.token_id)
        return {"token": text, "logprob": token.logprob, "bytes": list(text.encode())}


def usage_of(num_prompt_tokens: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """OpenAI's usage object over all choices of a prompt."""
    completion = sum(outcome.num_tokens for outcome in outcomes)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": num_prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": outcomes[0].cached_tokens if outcomes else 0},
    }


def embedding_answer(body: EmbeddingRequest, vectors: Sequence[Any], num_tokens: int, outcome: Outcome) -> bytes:
    """The JSON of an answer of /v1/embeddings, made vector by vector: other threads get their turn in between."""
    data = [json.dumps(embedding_object(i, vector, body.encoding_format)) for i, vector in enumerate(vectors)]
    rest = {**embedding_list(body.model, [], num_tokens), "foreshore": outcome.to_dict()}
    del rest["data"]
    return f'{{"data": [{", ".join(data)}], {json.dumps(rest)[1:]}'.encode()


def error_object(error: ForeshoreError, status: int) -> dict[str, Any]:
    """OpenAI's error object: message with remedy, type by status, param and code where known."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = error.details.get("reason") or error.code
    return {"error": {"message": str(error), "type": kind, "param": error.details.get("param"), "code": code}}


def status_of(error: ForeshoreError) -> int:
    """HTTP status of an error on the OpenAI routes, where wrong input is 400."""
    return 400 if error.http_status == 422 else error.http_status
