"""What all routers share: who asks, errors as RFC 9457 problem details, size limits, pages of a listing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud.control.identity import Principal, Role
from cloud.control.plane import ControlPlane
from wire.errors import ForeshoreError, InvalidInputError, NotAuthenticatedError, TooLargeError

MAX_BODY_BYTES = 2 << 20
MAX_PAGE = 500
PREFIX = "/api/v1"


class Body(BaseModel):
    """Base of request bodies: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def plane_of(request: Request) -> ControlPlane:
    """The control plane behind this request."""
    plane: ControlPlane = request.app.state.plane
    return plane


def principal_of(request: Request) -> Principal:
    """Who sent this request; `NotAuthenticatedError` otherwise."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise NotAuthenticatedError("no token was given", remedy="send Authorization: Bearer TOKEN")
    return plane_of(request).identity.get_principal(secret.strip())


def needs(*roles: Role) -> Callable[[Request], Principal]:
    """A dependency: the principal, which must hold one of `roles`."""

    def check(request: Request) -> Principal:
        principal = principal_of(request)
        principal.require(*roles)
        return principal

    return check


Plane = Annotated[ControlPlane, Depends(plane_of)]
Viewer = Annotated[Principal, Depends(needs(Role.VIEWER))]
Operator = Annotated[Principal, Depends(needs(Role.OPERATOR))]
Publisher = Annotated[Principal, Depends(needs(Role.PUBLISHER))]
Admin = Annotated[Principal, Depends(needs(Role.ADMIN))]
Worker = Annotated[Principal, Depends(needs(Role.WORKER))]
Gateway = Annotated[Principal, Depends(needs(Role.GATEWAY))]
Device = Annotated[Principal, Depends(needs(Role.DEVICE))]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
Cursor = Annotated[int, Query(ge=0, le=1_000_000)]


def page(items: Sequence[Any], limit: int, cursor: int) -> dict[str, Any]:
    """A page of a listing asked for with `limit + 1`; `next` is the cursor of the following one, or None."""
    return {"items": list(items[:limit]), "next": cursor + limit if len(items) > limit else None}


def problem(error: ForeshoreError) -> JSONResponse:
    """An error as the API tells it."""
    body = {
        "type": f"urn:foreshore:error:{error.code}",
        "title": error.code.replace("_", " "),
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
        "remedy": error.remedy,
        "details": error.details,
    }
    headers = {"www-authenticate": "Bearer"} if error.http_status == 401 else {}
    if "retry_after_s" in error.details:
        headers["retry-after"] = str(error.details["retry_after_s"])
    return JSONResponse(body, error.http_status, headers, media_type="application/problem+json")


def install_errors(app: FastAPI) -> None:
    """Every error below the API becomes problem details."""

    def ours(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ForeshoreError)
        return problem(error)

    def invalid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(InvalidInputError(f"{where}: {first['msg']}", remedy="see /api/docs"))

    def http(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_input")
        body = {"type": "about:blank", "title": str(error.detail), "status": error.status_code,
                "detail": str(error.detail), "code": code, "remedy": "see /api/docs"}  # fmt: skip
        return JSONResponse(body, error.status_code, error.headers, media_type="application/problem+json")

    app.add_exception_handler(ForeshoreError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


class BodyLimit:
    """ASGI middleware: a body over the limit is refused before anything parses it. Blobs have their own limit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what arrives."""
        if scope["type"] != "http" or scope["path"].startswith(f"{PREFIX}/blobs/"):
            await self._app(scope, receive, send)
            return
        length = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        error = TooLargeError("the body is too large", remedy=f"at most {MAX_BODY_BYTES} bytes")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            await problem(error)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise error
            return message

        await self._app(scope, counted, send)
