"""Bodies of the OpenAI routes as they enter: parsed, limited, and turned into our own values.

Fields that would change the answer and are not supported are refused by name; harmless ones (user, metadata) pass.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wire.embeddings import EmbeddingRequest
from wire.errors import InvalidInputError

MAX_CHOICES = 16
_Text = Annotated[str, Field(max_length=1 << 20)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Body):
    """Streaming details."""

    include_usage: bool = False


class TextPart(_Body):
    """Content given in parts; only text is supported."""

    type: Literal["text"]
    text: _Text


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | Annotated[list[TextPart], Field(max_length=256)] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates expect them."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Sampling(_Body):
    """What both routes share."""

    model: Annotated[str, Field(max_length=200)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    seed: int | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=8)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool = False
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def num_choices(self) -> int:
        """How many answers are wanted per prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """True when a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, num_logprobs: int | None) -> dict[str, Any]:
        """Fields of the engine's sampling message. A missing seed is drawn: a resumed answer must not change."""
        seed = secrets.randbits(62) if self.seed is None else self.seed & ((1 << 63) - 1)
        fields: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "seed": seed,
            "ignore_eos": self.ignore_eos,
        }
        schema = self.json_schema
        if schema is not None:
            fields["json_schema"] = json.dumps(schema)
        return fields if num_logprobs is None else {**fields, "logprobs": num_logprobs}

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema that `response_format` asks for; None for plain text."""
        wanted = self.response_format or {}
        kind = wanted.get("type", "text")
        if kind == "text":
            return None
        if kind == "json_object":
            return {"type": "object"}
        holder = wanted.get("json_schema")
        schema = holder.get("schema") if kind == "json_schema" and isinstance(holder, dict) else None
        if not isinstance(schema, dict):
            raise InvalidInputError(
                f"response_format of type {kind!r} without a schema is not supported",
                remedy="use text, json_object, or json_schema with json_schema.schema",
                param="response_format",
            )
        return schema

    def check_supported(self) -> None:
        """Refuse what would silently change the answer."""
        _ = self.json_schema
        refused = {"tools": bool(self.tools), "logit_bias": bool(self.logit_bias)}
        for name, is_used in refused.items():
            if is_used:
                raise InvalidInputError(f"{name} is not supported", remedy=f"leave {name} out", param=name)


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None when none are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[int], Field(min_length=1, max_length=1 << 20)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def check_supported(self) -> None:
        """See `Sampling.check_supported`."""
        super().check_supported()
        for name, is_used in (("echo", self.echo), ("suffix", bool(self.suffix)), ("best_of", (self.best_of or 1) > 1)):
            if is_used:
                raise InvalidInputError(f"{name} is not supported", remedy=f"leave {name} out", param=name)


def parse_chat(raw: bytes) -> ChatBody:
    """Parse a chat body; raises `InvalidInputError` that names the field."""
    try:
        body = ChatBody.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error) from error
    body.check_supported()
    return body


def parse_completion(raw: bytes) -> CompletionBody:
    """Parse a completion body; raises `InvalidInputError` that names the field."""
    try:
        body = CompletionBody.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error) from error
    body.check_supported()
    return body


def parse_embedding(raw: bytes) -> EmbeddingRequest:
    """Parse a body of /v1/embeddings; raises `InvalidInputError` that names the field."""
    try:
        return EmbeddingRequest.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> InvalidInputError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    return InvalidInputError(f"{param or 'body'}: {first['msg']}", remedy="see docs/gateway.md", param=param or None)
