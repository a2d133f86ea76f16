"""Decisions, the audit chain and the live events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse

from cloud.control import audit
from cloud.control.api.base import Admin, Cursor, Gateway, Limit, Plane, Viewer, needs, page
from cloud.control.events import Happening
from cloud.control.identity import Principal, Role
from cloud.control.plane import ControlPlane

router = APIRouter()

COMMENT_S = 15.0


@router.get("/decisions")
def list_decisions(
    plane: Plane,
    by: Viewer,
    subject: str | None = None,
    kind: str | None = None,
    limit: Limit = 100,
    cursor: Cursor = 0,
) -> dict[str, Any]:
    """Decision records, newest first."""
    rows = plane.decisions.newest(by.tenant, kind=kind, subject=subject, limit=limit + 1, offset=cursor)
    return page(rows, limit, cursor)


@router.get("/decisions/{decision_id}")
def get_decision(decision_id: str, plane: Plane, by: Viewer) -> dict[str, Any]:
    """One decision record."""
    return plane.decisions.get(by.tenant, decision_id)


@router.post("/decisions", status_code=201)
def store_decisions(
    body: Annotated[dict[str, Any] | list[dict[str, Any]], Body()], plane: Plane, by: Gateway
) -> dict[str, int]:
    """Keep one record, a list of them, or `{"records": [...]}`."""
    records = body if isinstance(body, list) else body.get("records", [body])
    records = records if isinstance(records, list) else [body]
    return {"stored": plane.decisions.store(by.tenant, by.subject, [dict(one) for one in records])}


@router.get("/audit")
def list_audit(
    plane: Plane,
    by: Admin,
    action: Annotated[str | None, Query(max_length=64)] = None,
    limit: Limit = 100,
    cursor: Cursor = 0,
) -> dict[str, Any]:
    """Who changed what, newest first; `action` may be the beginning of one."""
    with plane.database.read() as session:
        rows = audit.newest(session, by.tenant, action=action, limit=limit + 1, offset=cursor)
    return page(rows, limit, cursor)


@router.get("/audit/verify")
def verify_audit(plane: Plane, by: Admin) -> dict[str, Any]:
    """Whether the audit chain is whole."""
    found = plane.verify_audit(by.tenant)
    return {"entries": found.num_entries, "head": found.head, "is_whole": found.fault is None, "fault": found.fault}


@router.get("/audit/export")
def export_audit(plane: Plane, by: Admin) -> StreamingResponse:
    """The whole chain as a file that can be checked anywhere: `foreshore audit verify FILE`."""

    def lines() -> Iterator[bytes]:
        with plane.database.read() as session:
            yield from audit.export(session, by.tenant)

    headers = {"content-disposition": 'attachment; filename="foreshore-audit.jsonl"', "cache-control": "no-store"}
    return StreamingResponse(lines(), media_type="application/jsonl", headers=headers)


@router.get("/events")
def follow_events(
    request: Request,
    plane: Plane,
    by: Annotated[Principal, Depends(needs(Role.VIEWER))],
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """Everything of the tenant as it happens."""
    return stream_events(request, plane, by, lambda one: True, last_event_id)


def stream_events(
    request: Request,
    plane: ControlPlane,
    by: Principal,
    wanted: Callable[[Happening], bool],
    last_event_id: str | None = None,
) -> StreamingResponse:
    """Server-sent events: what `wanted` lets through, comments in quiet times, `reset` when events are lost."""

    async def run() -> AsyncIterator[bytes]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.set)

        stop = plane.bus.listen(wake)
        request.app.state.listeners.add(arrived)
        try:
            _, newest, _ = plane.bus.since(None)
            at = int(last_event_id) if last_event_id and last_event_id.isdigit() else newest
            yield b": open\n\n"
            while not request.app.state.is_stopping.is_set():
                events, newest, is_lost = plane.bus.since(at)
                if is_lost:
                    yield f"id: {newest}\nevent: reset\ndata: {{}}\n\n".encode()
                else:
                    for one in events:
                        if one.tenant == by.tenant and wanted(one):
                            yield f"id: {one.event_id}\nevent: {one.kind}\ndata: {one.to_json()}\n\n".encode()
                at = newest
                try:
                    await asyncio.wait_for(arrived.wait(), COMMENT_S)
                    arrived.clear()
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            stop()
            request.app.state.listeners.discard(arrived)

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(run(), media_type="text/event-stream", headers=headers)
