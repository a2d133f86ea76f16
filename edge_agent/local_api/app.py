"""The local API as one FastAPI application: routes, error shapes, health, metrics, decisions, status."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from edge_agent.agent import Agent
from edge_agent.climate import ClimateWatch
from edge_agent.cloud import Cloud
from edge_agent.local_api import embeddings, inference, openai
from edge_agent.local_api.context import Context
from wire.errors import ForeshoreError, InvalidInputError

MAX_BODY_BYTES = 8 << 20


def create_app(agent: Agent, cloud: Cloud, watch: ClimateWatch | None = None) -> FastAPI:
    """The application of one agent."""
    app = FastAPI(title="Foreshore agent", version="0.1.0", docs_url="/docs", redoc_url=None)
    context = Context(agent, cloud, watch or ClimateWatch())
    app.include_router(openai.router(context))
    app.include_router(inference.router(context))
    app.include_router(embeddings.router(context))

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "online": agent.is_online, "models": sorted(agent.engines.active())}

    @app.get("/status")
    async def status() -> Response:
        return Response(agent.report().to_bytes(), media_type="application/json")

    @app.get("/decisions/{decision_id}")
    async def decision(decision_id: str) -> dict[str, Any]:
        return context.get_decision(decision_id).to_dict()

    @app.get("/metrics")
    async def metrics() -> Response:
        figures = context.metrics
        figures.running.set(agent.admission.num_running)
        figures.waiting.set(agent.admission.num_waiting)
        figures.memory.set(agent.engines.used_bytes)
        figures.online.set(agent.is_online)
        climate = context.watch.climate
        for gauge, value in ((figures.temperature, climate.hottest_c), (figures.power, climate.power_w)):
            if value is not None:
                gauge.set(value)
        figures.cache.set(sum(engine.runtime.memory().cache_bytes for engine in agent.engines.loaded()))
        return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ForeshoreError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ForeshoreError)
        return _error(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _error(request, InvalidInputError(f"{where}: {first['msg']}", remedy="see /docs"))

    return app


def _error(request: Request, error: ForeshoreError) -> JSONResponse:
    status = 400 if isinstance(error, InvalidInputError) and error.http_status == 422 else error.http_status
    headers = {"retry-after": str(error.details["retry_after_s"])} if "retry_after_s" in error.details else {}
    if request.url.path.startswith("/v2"):
        return JSONResponse({"error": str(error)}, status, headers=headers)
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    body = {"message": str(error), "type": kind, "code": error.code, "param": None}
    return JSONResponse({"error": body}, status, headers=headers)
