"""The control plane over HTTP: routers, pages, health and metrics, around one `ControlPlane`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import threading
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from cloud.control.api import (
    access,
    builds,
    compatibility,
    content,
    docs,
    engines,
    fleet,
    records,
    rollouts,
    trust,
    webhooks,
)
from cloud.control.api.base import PREFIX, install_errors, principal_of
from cloud.control.api.shield import Shield
from cloud.control.identity import DEFAULT_TENANT, Role
from cloud.control.plane import ControlPlane
from cloud.control.settings import Settings
from wire.errors import NotAllowedError

LOOPBACK = frozenset({"127.0.0.1", "::1"})


def create_app(settings: Settings) -> FastAPI:
    """The application; the plane starts and stops with it."""
    plane = ControlPlane(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(plane.start)
        try:
            yield
        finally:
            stop_streams(app)
            await run_in_threadpool(plane.stop)

    app = FastAPI(
        title="Foreshore control plane",
        version=metadata.version("foreshore"),
        docs_url=None,
        openapi_url=docs.OPENAPI_URL,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.plane = plane
    app.state.is_stopping = threading.Event()
    app.state.listeners = set[asyncio.Event]()
    install_errors(app)
    for part in (access, content, compatibility, builds, engines, fleet, rollouts, records, webhooks, trust):
        app.include_router(part.router, prefix=PREFIX, tags=[part.__name__.rsplit(".", 1)[-1]])
    docs.install(app)
    _install_health(app, plane)
    if importlib.util.find_spec("cloud.control.pages.routes") is not None:
        from cloud.control.pages import routes

        routes.install(app)
    app.add_middleware(Shield)
    return app


def stop_streams(app: FastAPI) -> None:
    """Let open event streams and waiting workers end, so that the server can."""
    app.state.is_stopping.set()
    for arrived in list(app.state.listeners):
        arrived.set()


def _install_health(app: FastAPI, plane: ControlPlane) -> None:
    @app.get("/healthz")
    @app.get(f"{PREFIX}/healthz")
    def healthz() -> dict[str, Any]:
        """Whether the parts are up."""
        return {"status": "ok", "broker": plane.link.is_connected}

    @app.get("/metrics")
    @app.get(f"{PREFIX}/metrics")
    def metrics(request: Request) -> Response:
        """Figures of the whole platform for Prometheus; open on loopback, else for the platform's own viewers."""
        if request.client is None or request.client.host not in LOOPBACK:
            principal = principal_of(request)
            principal.require(Role.VIEWER)
            if principal.tenant != DEFAULT_TENANT:
                raise NotAllowedError("these are figures of all tenants", remedy="ask the platform's administrator")
        enrolled, online = plane.fleet.count_online()
        figures = {
            "foreshore_devices": enrolled,
            "foreshore_devices_online": online,
            "foreshore_broker_connected": int(plane.link.is_connected),
            "foreshore_broker_restarts_total": plane.broker.restarts if plane.broker else 0,
            "foreshore_delivery_bytes_total": plane.delivery.bytes_sent,
            "foreshore_delivery_chunks_total": plane.delivery.chunks_sent,
            "foreshore_messages_refused_total": plane.link.num_refused,
        }
        kind = {name: "counter" if name.endswith("_total") else "gauge" for name in figures}
        text = "".join(f"# TYPE {name} {kind[name]}\n{name} {value}\n" for name, value in figures.items())
        return Response(text, media_type="text/plain; version=0.0.4")
