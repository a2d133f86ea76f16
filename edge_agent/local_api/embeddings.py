"""`POST /v1/embeddings`: vectors of texts, by models on this device that give hidden states."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from edge_agent.local_api.context import Context
from edge_agent.runtimes.base import LanguageRuntime
from wire.errors import InvalidInputError

MAX_INPUTS = 256
QUEUE_TIMEOUT_S = 120.0


class EmbeddingRequest(BaseModel):
    """OpenAI's request; texts only."""

    model_config = ConfigDict(extra="ignore")
    model: Annotated[str, Field(max_length=200)]
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"


def router(context: Context) -> APIRouter:
    """The one route."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> JSONResponse:
        texts = [body.input] if isinstance(body.input, str) else body.input
        data: list[dict[str, Any]] = []
        num_tokens, begun, agent = 0, time.monotonic(), context.agent
        decision = context.decide({**request.headers, "x-foreshore-privacy": "local-only"}, body.model, 0, 0)
        async with agent.engines.use(body.model) as engine, agent.admission.enter(QUEUE_TIMEOUT_S):
            if engine.manifest.kind != "language":
                raise InvalidInputError(f"{body.model!r} is no language model", remedy="use /v2/models/NAME/infer")
            runtime = cast(LanguageRuntime, engine.runtime)
            for index, text in enumerate(texts):
                tokens = await asyncio.to_thread(runtime.encode, text)
                vector = await asyncio.to_thread(runtime.embed, tokens)
                num_tokens += len(tokens)
                raw = base64.b64encode(vector.astype("<f4").tobytes()).decode()
                value = vector.tolist() if body.encoding_format == "float" else raw
                data.append({"object": "embedding", "index": index, "embedding": value})
        context.finish(decision, {"total_s": time.monotonic() - begun})
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        answer = {"object": "list", "model": body.model, "data": data, "usage": usage}
        return JSONResponse(answer, headers=context.answer_headers(decision, "device", engine))

    return routes
