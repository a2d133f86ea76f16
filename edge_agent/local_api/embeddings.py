"""`POST /v1/embeddings`: vectors of texts, by models on this device that give hidden states."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from edge_agent.local_api.context import Context
from edge_agent.runtimes.base import LanguageRuntime
from wire.embeddings import EmbeddingRequest, embedding_list, embedding_object
from wire.errors import InvalidInputError

MAX_INPUTS = 256
QUEUE_TIMEOUT_S = 120.0


def router(context: Context) -> APIRouter:
    """The one route."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> JSONResponse:
        texts = body.inputs(MAX_INPUTS)
        if not isinstance(texts[0], str):
            raise InvalidInputError("input is token ids", remedy="send texts to a device", param="input")
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
                data.append(embedding_object(index, vector, body.encoding_format))
        context.finish(decision, {"total_s": time.monotonic() - begun})
        answer = embedding_list(body.model, data, num_tokens)
        return JSONResponse(answer, headers=context.answer_headers(decision, "device", engine))

    return routes
