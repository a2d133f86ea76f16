"""The gateway's HTTP face: OpenAI's routes over the serving workers, decisions, metrics, health.

Rules: nobody is served without a token; errors are OpenAI error objects; a stream's status is decided by its first
piece; after a failure a stream ends with an error object and without `[DONE]`; a client that leaves ends the work.
This file only composes: text, routing, generation and answers live in their own files.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cloud.gateway.answers import Frame, Piece, embedding_answer, error_object, status_of, usage_of
from cloud.gateway.auth import Authenticator, Caller, read_bearer
from cloud.gateway.choices import Choices
from cloud.gateway.decisions import DecisionLog
from cloud.gateway.fleet import Fleet
from cloud.gateway.generation import Generation, Job
from cloud.gateway.metrics import Metrics
from cloud.gateway.presence import wait_until_gone, while_connected
from cloud.gateway.schemas import (
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    Sampling,
    parse_chat,
    parse_completion,
    parse_embedding,
)
from cloud.gateway.vectors import EmbeddingJob, Vectors, token_inputs
from model_registry.chat_tokenizer import ChatTokenizer
from wire.decision import Decision
from wire.errors import ForeshoreError, InvalidInputError, NotFoundError, TooLargeError, UnavailableError

MAX_BODY_BYTES = 8 << 20
MAX_OPEN_REQUESTS = 512
HEARTBEAT_S = 15.0
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@dataclass(frozen=True)
class ServedModel:
    """A model by its public name: its text side and its workers."""

    name: str
    tokenizer: ChatTokenizer
    fleet: Fleet


@dataclass
class Answer:
    """One request on its way: what to send, and what is known about it."""

    model: ServedModel
    choices: Choices
    frame: Frame
    body: Sampling
    num_prompt_tokens: int
    began_at: float
    is_counted: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Where and why, for those who do not read the body."""
        return _headers_of(self.choices.generations[0].outcome.decision)

    def usage(self) -> dict[str, Any]:
        """Tokens over all choices."""
        return usage_of(self.num_prompt_tokens, [g.outcome for g in self.choices.generations])

    def foreshore(self) -> dict[str, Any]:
        """Our extension: how the first choice was served."""
        return self.choices.generations[0].outcome.to_dict()


class Gateway:
    """The handlers and what they share."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        auth: Authenticator,
        log: DecisionLog,
        *,
        has_open_metrics: bool = False,
    ) -> None:
        self.models = models
        self.auth = auth
        self.log = log
        self.metrics = Metrics()
        self.has_open_metrics = has_open_metrics
        self._num_open = 0

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        caller = await self._caller(request)
        body = parse_chat(await _read_body(request))
        model = self._model(body.model)
        prompt = model.tokenizer.encode_chat([message.plain() for message in body.messages])
        return await self._answer(request, caller, model, body, [prompt])

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        caller = await self._caller(request)
        body = parse_completion(await _read_body(request))
        model = self._model(body.model)
        return await self._answer(request, caller, model, body, _prompts(body, model.tokenizer))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        caller = await self._caller(request)
        body = parse_embedding(await _read_body(request))
        model = self._model(body.model)
        inputs = await asyncio.to_thread(token_inputs, body, model.tokenizer)
        self._check_room()
        job = EmbeddingJob(inputs, caller.salt, caller.tenant, model.name, _parent_of(request))
        vectors, began_at, status = Vectors(job, model.fleet, self.log), time.monotonic(), "499"
        self._num_open += 1
        try:
            found = await while_connected(request, vectors.run())
            content = await asyncio.to_thread(embedding_answer, body, found, job.num_tokens, vectors.outcome)
            status = "200"
            return Response(content, media_type="application/json", headers=_headers_of(vectors.outcome.decision))
        except ForeshoreError as error:
            status = str(status_of(error))
            raise
        finally:
            self._num_open -= 1
            self.metrics.requests.labels("embedding", status).inc()
            self.metrics.record(model.name, job.num_tokens, vectors.outcome, time.monotonic() - began_at)

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        await self._caller(request)
        return JSONResponse({"object": "list", "data": [_model_object(name) for name in self.models]})

    async def get_model(self, request: Request) -> Response:
        """GET /v1/models/{name}."""
        await self._caller(request)
        return JSONResponse(_model_object(self._model(request.path_params["name"]).name))

    async def decision(self, request: Request) -> Response:
        """GET /decisions/{id}."""
        caller = await self._caller(request)
        return JSONResponse(self.log.get(caller.tenant, request.path_params["decision_id"]))

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        if not self.has_open_metrics:
            await self._caller(request)
        text = self.metrics.render({name: model.fleet for name, model in self.models.items()})
        return Response(text, media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        """GET /healthz: 200 when every model has a worker."""
        models = {name: [v.name for v in m.fleet.views() if not v.unfit] for name, m in self.models.items()}
        is_ready = all(models.values())
        return JSONResponse({"ready": is_ready, "workers": models}, status_code=200 if is_ready else 503)

    async def _caller(self, request: Request) -> Caller:
        return await self.auth.authenticate(read_bearer(request.headers.get("authorization")))

    def _model(self, name: str) -> ServedModel:
        model = self.models.get(name)
        if model is None:
            raise NotFoundError(
                f"the model {name!r} does not exist",
                remedy=f"one of {', '.join(self.models)}",
                param="model",
                reason="model_not_found",
            )
        return model

    def _check_room(self) -> None:
        if self._num_open >= MAX_OPEN_REQUESTS:
            raise UnavailableError(f"{self._num_open} requests are open", remedy="try again soon")

    async def _answer(
        self, request: Request, caller: Caller, model: ServedModel, body: Sampling, prompts: list[list[int]]
    ) -> Response:
        self._check_room()
        answer = _prepare(request, caller, model, body, prompts, self.log)
        self._num_open += 1
        answer.choices.start()
        watcher = asyncio.create_task(_close_when_gone(request, answer.choices), name="watch client")
        try:
            first = await answer.choices.next(3600)
            if body.stream:
                stream = self._stream(answer, first, watcher)
                headers = {**_STREAM_HEADERS, **answer.headers}
                return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
            pieces = await _collect(answer.choices, first)
            self._count(answer, "200")
            return JSONResponse(answer.frame.whole(pieces, answer.usage(), answer.foreshore()), headers=answer.headers)
        except BaseException as error:
            self._count(answer, str(status_of(error)) if isinstance(error, ForeshoreError) else "499")
            await self._end(answer, watcher)
            raise
        finally:
            if not body.stream:
                await self._end(answer, watcher)

    async def _stream(self, answer: Answer, first: Piece | None, watcher: asyncio.Task[None]) -> AsyncIterator[bytes]:
        frame = answer.frame
        begun: set[int] = set()
        status = "499"
        try:
            piece = first
            while piece is not None:
                chunk = frame.chunk(piece, is_first=piece.index not in begun)
                begun.add(piece.index)
                if piece.finish_reason is not None:
                    chunk["foreshore"] = answer.foreshore()
                yield _event(chunk)
                piece = None
                async for news in _with_heartbeats(answer.choices):
                    if news is None:
                        yield b": keep-alive\n\n"
                    piece = news
            if answer.body.wants_usage:
                yield _event(frame.usage_chunk(answer.usage(), answer.foreshore()))
            yield b"data: [DONE]\n\n"
            status = "200"
        except ForeshoreError as error:
            status = str(status_of(error))
            yield _event(error_object(error, status_of(error)))
        finally:
            self._count(answer, status)
            await self._end(answer, watcher)

    async def _end(self, answer: Answer, watcher: asyncio.Task[None]) -> None:
        watcher.cancel()
        await answer.choices.close()

    def _count(self, answer: Answer, status: str) -> None:
        if answer.is_counted:
            return
        answer.is_counted = True
        self._num_open -= 1
        self.metrics.requests.labels(answer.frame.kind, status).inc()
        for index, generation in enumerate(answer.choices.generations):
            num_prompt = len(generation.job.token_ids) if index % answer.body.num_choices == 0 else 0
            elapsed = time.monotonic() - answer.began_at
            self.metrics.record(answer.model.name, num_prompt, generation.outcome, elapsed)


def create_app(gateway: Gateway) -> FastAPI:
    """The ASGI application; its lifespan polls the workers and forwards decisions."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(m.fleet.watch(), name=f"watch {m.name}") for m in gateway.models.values()]
        tasks.append(asyncio.create_task(gateway.log.forward(), name="forward decisions"))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await gateway.log.send_batch()
            for model in gateway.models.values():
                await model.fleet.close()

    app = FastAPI(title="Foreshore gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ForeshoreError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_api_route("/v1/chat/completions", gateway.chat, methods=["POST"])
    app.add_api_route("/v1/completions", gateway.completions, methods=["POST"])
    app.add_api_route("/v1/embeddings", gateway.embeddings, methods=["POST"])
    app.add_api_route("/v1/models", gateway.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", gateway.get_model, methods=["GET"])
    app.add_api_route("/decisions/{decision_id}", gateway.decision, methods=["GET"])
    app.add_api_route("/metrics", gateway.show_metrics, methods=["GET"])
    app.add_api_route("/healthz", gateway.health, methods=["GET"])
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ForeshoreError)
    status = status_of(error)
    headers = {}
    if status in (429, 503):
        headers["retry-after"] = str(max(1, round(float(error.details.get("retry_after_s", 1)))))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_object(error, status), status_code=status, headers=headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = ForeshoreError(f"{request.method} {request.url.path}: {error.detail}", remedy="see docs/gateway.md")
    return JSONResponse(error_object(cause, error.status_code), status_code=error.status_code)


def _prepare(
    request: Request, caller: Caller, model: ServedModel, body: Sampling, prompts: list[list[int]], log: DecisionLog
) -> Answer:
    is_chat = isinstance(body, ChatBody)
    num_logprobs = body.num_logprobs if isinstance(body, ChatBody) else getattr(body, "logprobs", None)
    if len(prompts) * body.num_choices > MAX_CHOICES:
        raise InvalidInputError(
            f"{len(prompts)} prompts with n={body.num_choices}", remedy=f"at most {MAX_CHOICES} choices", param="n"
        )
    generations = []
    parent = _parent_of(request)
    for prompt in prompts:
        sampling = body.sampling(_max_tokens(body, model, len(prompt)), num_logprobs)
        for index in range(body.num_choices):
            fields = {**sampling, "seed": (sampling["seed"] + index) & ((1 << 63) - 1)}
            job = Job(prompt, fields, caller.salt, caller.tenant, model.name, parent)
            generations.append(Generation(job, model.fleet, log))
    kind, prefix = ("chat.completion", "chatcmpl") if is_chat else ("text_completion", "cmpl")
    return Answer(
        model=model,
        choices=Choices(generations, body.num_choices, model.tokenizer, body.stops),
        frame=Frame(
            kind,
            f"{prefix}-{uuid.uuid4().hex}",
            int(time.time()),
            model.name,
            model.tokenizer,
            num_logprobs is not None,
        ),
        body=body,
        num_prompt_tokens=sum(len(prompt) for prompt in prompts),
        began_at=time.monotonic(),
    )


def _max_tokens(body: Sampling, model: ServedModel, num_prompt_tokens: int) -> int:
    """What the client asked for; by default 16 for a completion (OpenAI's) and the rest of the context for chat."""
    if isinstance(body, ChatBody):
        wanted = body.max_completion_tokens or body.max_tokens
        return wanted or max(1, model.fleet.max_context_tokens - num_prompt_tokens)
    return body.max_tokens or 16


def _prompts(body: CompletionBody, tokenizer: ChatTokenizer) -> list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        prompts = [tokenizer.encode(prompt)]
    elif isinstance(prompt[0], str):
        prompts = [tokenizer.encode(str(text)) for text in prompt]
    elif isinstance(prompt[0], list):
        prompts = [list(tokens) for tokens in prompt if isinstance(tokens, list)]
    else:
        prompts = [[int(token) for token in prompt if isinstance(token, int)]]
    if any(not tokens or min(tokens) < 0 or max(tokens) >= 1 << 32 for tokens in prompts):
        raise InvalidInputError("a prompt is empty or not token ids", remedy="send text or token ids", param="prompt")
    return prompts


def _headers_of(decision: Decision | None) -> dict[str, str]:
    location = {"x-foreshore-location": "cloud"}
    if decision is None:
        return location
    reason = decision.reason.encode("ascii", "replace").decode()[:400]
    return {"x-foreshore-decision": decision.decision_id, "x-foreshore-reason": reason, **location}


def _parent_of(request: Request) -> str | None:
    return (request.headers.get("x-foreshore-decision") or "")[:64] or None


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "foreshore"}


async def _read_body(request: Request) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise TooLargeError(f"the body exceeds {MAX_BODY_BYTES} bytes", remedy="send less")
        chunks.append(chunk)
    return b"".join(chunks)


async def _collect(choices: Choices, first: Piece | None) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in choices.generations]
    piece = first
    while piece is not None:
        pieces[piece.index].append(piece)
        piece = await choices.next(3600)
    return pieces


async def _with_heartbeats(choices: Choices) -> AsyncIterator[Piece | None]:
    """None for each heartbeat that is due, then at most one piece; nothing when all choices have ended."""
    while True:
        try:
            piece = await choices.next(HEARTBEAT_S)
        except TimeoutError:
            yield None
            continue
        if piece is not None:
            yield piece
        return


async def _close_when_gone(request: Request, choices: Choices) -> None:
    await wait_until_gone(request)
    await choices.abandon()


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
