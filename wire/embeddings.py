"""Bodies of `POST /v1/embeddings`, on a device and in the cloud: OpenAI's request, checked, and OpenAI's answer.

https://platform.openai.com/docs/api-reference/embeddings. Vectors are not shortened: `dimensions` is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from wire.errors import InvalidInputError

MAX_TOKEN_ID = (1 << 32) - 1
Inputs = list[str] | list[list[int]]


class EmbeddingRequest(BaseModel):
    """What a client sends. `input` is a text, a list of texts, a list of token ids or a list of such lists."""

    model_config = ConfigDict(extra="ignore")
    model: Annotated[str, Field(max_length=200)]
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def inputs(self, max_inputs: int) -> Inputs:
        """All inputs as one list of one kind; raises `InvalidInputError` that names what is wrong and its place."""
        if self.dimensions is not None:
            raise InvalidInputError(
                f"dimensions is {self.dimensions}, and vectors are not shortened",
                remedy="leave dimensions out",
                param="dimensions",
            )
        given = self.input
        is_one = isinstance(given, str) or (isinstance(given, list) and bool(given) and type(given[0]) is int)
        items = [given] if is_one else given
        if not isinstance(items, list) or not items:
            what = "an empty list" if items == [] else type(items).__name__
            raise _refusal(f"input is {what}", "send a text, texts, token ids or lists of token ids")
        if len(items) > max_inputs:
            raise _refusal(f"{len(items)} inputs in one request", f"send at most {max_inputs}")
        if len({type(item) for item in items}) > 1:
            raise _refusal("input mixes texts and token ids", "send one kind in a request")
        for index, item in enumerate(items):
            _check(item, "input" if is_one else f"input {index}")
        return items


def embedding_object(index: int, vector: Any, encoding_format: str) -> dict[str, Any]:
    """One entry of `data` for a float32 vector [size]; base64 is of little-endian float32."""
    raw = vector.astype("<f4")
    value = raw.tolist() if encoding_format == "float" else base64.b64encode(raw.tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": value}


def embedding_list(model: str, data: Sequence[dict[str, Any]], num_tokens: int) -> dict[str, Any]:
    """The whole answer; `num_tokens` are those of all inputs."""
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "model": model, "data": list(data), "usage": usage}


def _check(item: Any, name: str) -> None:
    if not isinstance(item, (str, list)):
        raise _refusal(f"{name} is {type(item).__name__}", "send a text or token ids")
    if not item:
        raise _refusal(f"{name} is empty", "send at least one token")
    if isinstance(item, list):
        strangers = [token for token in item if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID]
        if strangers:
            raise _refusal(f"{name} holds {str(strangers[0])[:50]!r}", "send token ids of this model, or texts")


def _refusal(message: str, remedy: str) -> InvalidInputError:
    return InvalidInputError(message, remedy=remedy, param="input")
