"""Open Inference Protocol (KServe v2) for tensors, and `/v1/classify` for images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from edge_agent.engines import Engine
from edge_agent.local_api.context import Context
from edge_agent.runtimes.base import Array, TensorRuntime, TensorSpec
from model_registry.manifest import Vision
from wire.errors import ForeshoreError, InvalidInputError, NotFoundError, TooLargeError, UnavailableError

MAX_BODY_BYTES = 64 << 20


@dataclass(frozen=True)
class _Done:
    """An answered request."""

    outputs: dict[str, Array]
    engine: Engine
    headers: dict[str, str]


def router(context: Context) -> APIRouter:
    """The `/v2` routes and `/v1/classify`."""
    routes = APIRouter()

    @routes.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "foreshore-agent", "version": "0.1.0", "extensions": ["binary_tensor_data"]}

    @routes.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @routes.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @routes.get("/v2/models/{name}/ready")
    @routes.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        _find(context, name, version)
        return {"name": name, "ready": True}

    @routes.get("/v2/models/{name}")
    @routes.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        engine = _find(context, name, version)
        runtime = cast(TensorRuntime, engine.runtime)
        return {
            "name": name,
            "versions": [engine.slot.version],
            "platform": f"{runtime.name}_onnx",
            "inputs": [_described(spec) for spec in runtime.inputs],
            "outputs": [_described(spec) for spec in runtime.outputs],
        }

    @routes.post("/v2/models/{name}/infer")
    @routes.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(name: str, request: Request, version: str | None = None) -> Response:
        from edge_agent.local_api.tensors import parse, respond

        _find(context, name, version)
        asked = parse(await _body(request), request.headers.get("inference-header-content-length"))
        done = await _run(context, name, version, request, lambda _: asked.inputs, asked.outputs)
        return respond(asked, done.outputs, name, done.engine, done.headers)

    @routes.post("/v1/classify")
    async def classify(model: str, request: Request) -> JSONResponse:
        from edge_agent.local_api.tensors import prepare_image, rank

        _vision(_find(context, model, None))
        data = await _body(request)

        def prepare(engine: Engine) -> dict[str, Array]:
            return {cast(TensorRuntime, engine.runtime).inputs[0].name: prepare_image(data, _vision(engine))}

        done = await _run(context, model, None, request, prepare, [])
        labels = rank(next(iter(done.outputs.values())), _vision(done.engine))
        body = {"model": model, "version": done.engine.slot.version, "labels": labels}
        return JSONResponse(body, headers=done.headers)

    return routes


async def _run(
    context: Context,
    name: str,
    version: str | None,
    request: Request,
    prepare: Callable[[Engine], dict[str, Array]],
    outputs: list[str],
) -> _Done:
    """Inputs are made for the very engine that answers, whatever is switched meanwhile."""
    decision = context.decide({**request.headers, "x-foreshore-privacy": "local-only"}, name, 0, 0)
    begun = time.monotonic()
    async with context.agent.engines.use(name) as engine:
        _check(engine, name, version)
        try:
            result = await asyncio.to_thread(_infer, engine, prepare, outputs)
        except ForeshoreError:
            raise
        except Exception as error:
            engine.conduct.failed()
            context.metrics.requests.labels("device", "error").inc()
            raise UnavailableError(f"the model failed: {error}", remedy="check the inputs, then try again") from error
    seconds = time.monotonic() - begun
    context.metrics.requests.labels("device", "ok").inc()
    context.metrics.seconds.labels("device").observe(seconds)
    context.finish(decision, {"total_s": seconds})
    return _Done(result, engine, context.answer_headers(decision, "device", engine))


def _infer(engine: Engine, prepare: Callable[[Engine], dict[str, Array]], outputs: list[str]) -> dict[str, Array]:
    from edge_agent.local_api.tensors import is_finite

    inputs = prepare(engine)
    begun = time.perf_counter()
    result = cast(TensorRuntime, engine.runtime).infer(inputs, outputs)
    time_ms = (time.perf_counter() - begun) * 1000
    if is_finite(result.values()):
        engine.conduct.answered(time_ms)
    else:
        engine.conduct.failed()
    return result


def _vision(engine: Engine) -> Vision:
    if engine.manifest.vision is None:
        raise InvalidInputError(f"{engine.manifest.name!r} is no image classifier", remedy="use /v2/models/NAME/infer")
    return engine.manifest.vision


def _find(context: Context, name: str, version: str | None) -> Engine:
    engine = context.agent.engines.find(name)
    if engine is None:
        raise NotFoundError(f"tensor model {name!r} is not on this device", remedy="see GET /v1/models")
    _check(engine, name, version)
    return engine


def _check(engine: Engine, name: str, version: str | None) -> None:
    if engine.manifest.kind != "tensor":
        raise NotFoundError(f"{name!r} is no tensor model", remedy="see GET /v1/models")
    if version is not None and version != engine.slot.version:
        raise NotFoundError(f"version {version!r} of {name!r} does not run", remedy=f"{engine.slot.version} does")


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise TooLargeError(f"the body has more than {MAX_BODY_BYTES} bytes", remedy="send fewer at once")
        parts.append(part)
    return b"".join(parts)


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
