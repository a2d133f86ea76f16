"""OpenAI's routes on the device: chat and plain completions, streaming or not, answered here or relayed.

What begins on the device ends there; what is sent to the cloud and cannot be delivered is answered here when it can.
A stream that fails after it began ends with an error event, never with `[DONE]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from edge_agent.engines import Engine
from edge_agent.local_api.context import Context
from edge_agent.runtimes.base import STEP_TIMEOUT_S, LanguageRuntime, Piece, Sampling
from wire.decision import Decision
from wire.errors import ForeshoreError, InvalidInputError, UnavailableError

QUEUE_TIMEOUT_S = 120.0
DEFAULT_MAX_TOKENS = 128
GUESSED_BYTES_PER_TOKEN = 4
_FORWARDED = ("x-foreshore-prefer", "x-foreshore-deadline-ms")
_SSE = {"cache-control": "no-store", "x-accel-buffering": "no"}


class _Common(BaseModel):
    model_config = ConfigDict(extra="ignore")
    model: Annotated[str, Field(max_length=200)]
    max_tokens: Annotated[int | None, Field(ge=1, le=1 << 20)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    seed: Annotated[int | None, Field(ge=0, lt=1 << 63)] = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    response_format: dict[str, Any] | None = None

    def sampling(self, max_tokens: int) -> Sampling:
        """How the device samples; OpenAI's default temperature is 1."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=tuple(part for part in stop if part)[:4],
            json_schema=_json_schema(self.response_format),
        )


def _json_schema(response_format: dict[str, Any] | None) -> str | None:
    """The schema that an answer must match, as JSON text; raises `InvalidInputError` for another format."""
    kind = (response_format or {}).get("type", "text")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return json.dumps({"type": "object"})
    schema = (response_format.get("json_schema") or {}).get("schema") if kind == "json_schema" else None
    if not isinstance(schema, dict):
        raise InvalidInputError(
            f"response_format has type {kind!r} and no schema to follow",
            remedy='send {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}',
        )
    return json.dumps(schema)


class _Part(BaseModel):
    type: str
    text: str = ""


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Annotated[str, Field(pattern="^(system|developer|user|assistant|tool)$")]
    content: str | list[_Part] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as templates want them."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Common):
    """`POST /v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=1 << 20)] = None


class CompletionRequest(_Common):
    """`POST /v1/completions`."""

    prompt: str | list[str]


class _Job:
    """One request on its way through."""

    def __init__(self, context: Context, body: _Common, path: str, raw: dict[str, Any]) -> None:
        self.context, self.body, self.path, self.raw = context, body, path, raw
        self.is_chat = isinstance(body, ChatRequest)
        self.begun = time.monotonic()
        self.created = int(time.time())
        self.completion_id = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex
        self.prompt: list[int] = []
        self.num_tokens = 0
        self.engine: Engine | None = None  # that answers on the device

    @property
    def wants_usage(self) -> bool:
        return bool((self.body.stream_options or {}).get("include_usage"))

    def max_tokens(self) -> int:
        limit = self.body.max_completion_tokens if isinstance(self.body, ChatRequest) else None
        return limit or self.body.max_tokens or DEFAULT_MAX_TOKENS

    def tokenise(self, runtime: LanguageRuntime) -> list[int]:
        if isinstance(self.body, ChatRequest):
            return runtime.chat_tokens([message.plain() for message in self.body.messages])
        prompt = cast(CompletionRequest, self.body).prompt
        if isinstance(prompt, list):
            if len(prompt) != 1:
                raise InvalidInputError(f"{len(prompt)} prompts in one request", remedy="send one")
            prompt = prompt[0]
        return runtime.encode(prompt)

    def usage(self) -> dict[str, int]:
        done = {"prompt_tokens": len(self.prompt), "completion_tokens": self.num_tokens}
        return {**done, "total_tokens": sum(done.values())}

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.is_chat else "text_completion"
        return {"id": self.completion_id, "object": kind, "created": self.created, "model": self.body.model}

    def choice(self, text: str, finish_reason: str | None, *, chunk: bool, first: bool = False) -> dict[str, Any]:
        if not self.is_chat:
            return {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}
        if not chunk:
            message = {"role": "assistant", "content": text}
            return {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def router(context: Context) -> APIRouter:
    """The `/v1` routes."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(_Job(context, body, "/v1/chat/completions", await request.json()), request)

    @routes.post("/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await _answer(_Job(context, body, "/v1/completions", await request.json()), request)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        engines = context.agent.engines.active()
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "device", "version": engine.slot.version}
            for name, engine in sorted(engines.items())
        ]
        return {"object": "list", "data": data}

    return routes


async def _answer(job: _Job, request: Request) -> Response:
    context = job.context
    engine = context.agent.engines.find(job.body.model)
    if engine is not None and engine.manifest.kind != "language":
        raise InvalidInputError(f"{job.body.model!r} is no language model", remedy="use /v2 or /v1/classify")
    if engine is not None:
        job.prompt = await asyncio.to_thread(job.tokenise, cast(LanguageRuntime, engine.runtime))
        num_prompt = len(job.prompt)
    else:
        num_prompt = len(json.dumps(job.raw)) // GUESSED_BYTES_PER_TOKEN
    decision = context.decide(request.headers, job.body.model, num_prompt, job.max_tokens())
    if decision.chosen == "cloud":
        try:
            return await _relay(job, decision, request)
        except UnavailableError:
            decision = context.decide(request.headers, job.body.model, num_prompt, job.max_tokens())
    if decision.chosen != "device":
        context.metrics.requests.labels("none", "unavailable").inc()
        context.finish(decision, {})
        raise _refusal(decision)
    return await (_stream(job, decision, request) if job.body.stream else _whole(job, decision))


def _refusal(decision: Decision) -> ForeshoreError:
    """Why neither place can answer; an input that only the device could take is the caller's to mend."""
    details = "; ".join(f"{c.name}: {', '.join(c.excluded)}" for c in decision.candidates)
    if any("tokens exceed" in reason for c in decision.candidates for reason in c.excluded):
        return InvalidInputError(f"nothing can answer this ({details})", remedy="send less text")
    return UnavailableError(f"nothing can answer this now ({details})", remedy="try again later", retry_after_s=5)


async def _relay(job: _Job, decision: Decision, request: Request) -> Response:
    context = job.context
    forwarded = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
    reply = await context.cloud.send(job.path, job.raw, {**forwarded, "x-foreshore-parent": decision.decision_id})
    headers = {**reply.headers, **context.answer_headers(decision, "cloud")}

    async def pass_on() -> AsyncIterator[bytes]:
        first: float | None = None
        try:
            async for part in reply.stream:
                if first is None:
                    first = time.monotonic() - job.begun
                    context.metrics.ttft.labels("cloud").observe(first)
                yield part
        except UnavailableError as error:
            yield _event({"error": {"message": str(error), "type": "server_error", "code": error.code}})
        finally:
            _count(job, decision, "cloud", "ok" if reply.status < 400 else "error", first)

    return StreamingResponse(pass_on(), status_code=reply.status, headers=headers)


async def _whole(job: _Job, decision: Decision) -> Response:
    context = job.context
    texts, finish_reason = [], "stop"
    async with context.agent.engines.use(job.body.model) as engine, context.agent.admission.enter(QUEUE_TIMEOUT_S):
        first: float | None = None
        async for piece in _pieces(job, engine):
            first = first if first is not None else time.monotonic() - job.begun
            texts.append(piece.text)
            finish_reason = piece.finish_reason or finish_reason
    _count(job, decision, "device", "ok", first)
    choice = job.choice("".join(texts), finish_reason, chunk=False)
    body = {**job.head(chunk=False), "choices": [choice], "usage": job.usage()}
    return JSONResponse(body, headers=context.answer_headers(decision, "device", engine))


async def _stream(job: _Job, decision: Decision, request: Request) -> Response:
    """The first piece is awaited before status 200 is promised."""
    context = job.context
    events = _events(job, decision)
    first = await anext(events)

    async def all_events() -> AsyncIterator[bytes]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await events.aclose()

    headers = {**_SSE, **context.answer_headers(decision, "device", job.engine)}
    return StreamingResponse(all_events(), media_type="text/event-stream", headers=headers)


async def _events(job: _Job, decision: Decision) -> AsyncGenerator[bytes, None]:
    context = job.context
    first: float | None = None
    outcome = "cancelled"
    try:
        async with context.agent.engines.use(job.body.model) as engine, context.agent.admission.enter(QUEUE_TIMEOUT_S):
            job.engine = engine
            async for piece in _pieces(job, engine):
                is_first = first is None
                if first is None:
                    first = time.monotonic() - job.begun
                    context.metrics.ttft.labels("device").observe(first)
                choice = job.choice(piece.text, piece.finish_reason, chunk=True, first=is_first)
                yield _event({**job.head(chunk=True), "choices": [choice]})
        if job.wants_usage:
            yield _event({**job.head(chunk=True), "choices": [], "usage": job.usage()})
        outcome = "ok"
        yield b"data: [DONE]\n\n"
    except ForeshoreError as error:
        outcome = "error"
        if first is None:
            raise
        yield _event({"error": {"message": str(error), "type": "server_error", "code": error.code}})
    finally:
        _count(job, decision, "device", outcome, first)


async def _pieces(job: _Job, engine: Engine) -> AsyncIterator[Piece]:
    """Pieces as the runtime delivers them; leaving early cancels the stream."""
    runtime = cast(LanguageRuntime, engine.runtime)
    sampling = job.body.sampling(job.max_tokens())
    mailbox = _Mailbox()
    begun = time.monotonic()
    cancel = await asyncio.to_thread(runtime.start, job.prompt, sampling, mailbox.put)
    try:
        finish_reason = None
        while finish_reason is None:
            piece = await mailbox.get()
            finish_reason = piece.finish_reason
            job.num_tokens += piece.token >= 0
            if finish_reason in {"stop", "length"}:
                engine.conduct.answered((time.monotonic() - begun) * 1000 / max(job.num_tokens, 1))
            yield piece
    except ForeshoreError:
        raise
    except Exception as error:
        engine.conduct.failed()
        raise UnavailableError(f"the model failed: {error}", remedy="try again") from error
    finally:
        cancel()
        if job.num_tokens > 1:
            job.context.tokens_per_s[job.body.model] = job.num_tokens / max(time.monotonic() - begun, 1e-6)


class _Mailbox:
    """From the runtime's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()  # bounded by max_tokens

    def put(self, piece: Piece | Exception) -> None:
        """From any thread; nobody listens any more once the agent has stopped."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, piece)

    async def get(self) -> Piece:
        """The next piece; raises what the stream ended with."""
        async with asyncio.timeout(STEP_TIMEOUT_S):
            piece = await self._arrived.get()
        if isinstance(piece, Exception):
            raise piece
        return piece


def _count(job: _Job, decision: Decision, place: str, outcome: str, first_s: float | None) -> None:
    total = time.monotonic() - job.begun
    job.context.metrics.requests.labels(place, outcome).inc()
    job.context.metrics.seconds.labels(place).observe(total)
    actual = {"total_s": total, "tokens": float(job.num_tokens)}
    job.context.finish(decision, {**actual, "ttft_s": first_s} if first_s is not None else actual)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
