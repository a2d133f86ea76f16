"""What all routers share: who asks, errors as RFC 9457 problem details, pages of a listing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import anyio.from_thread
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from cloud.control.identity import Principal, Role
from cloud.control.plane import ControlPlane
from wire.errors import ForeshoreError, InvalidInputError, NotAllowedError, NotAuthenticatedError

MAX_PAGE = 500
PREFIX = "/api/v1"
DOOR, PEER = "door", "peer"  # keys of scope["state"], set by `listeners` on connections through the devices' door


class Body(BaseModel):
    """Base of request bodies: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def plane_of(request: Request) -> ControlPlane:
    """The control plane behind this request."""
    plane: ControlPlane = request.app.state.plane
    return plane


def principal_of(request: Request) -> Principal:
    """Who sent this request; `NotAuthenticatedError` otherwise. Through the devices' door only a certificate counts."""
    state = request.scope.get("state", {})
    if state.get(DOOR) == "device":
        if state[PEER] is None:
            raise NotAuthenticatedError("no certificate was shown", remedy="connect with the device's certificate")
        return plane_of(request).identity.get_device(state[PEER])
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise NotAuthenticatedError("no token was given", remedy="send Authorization: Bearer TOKEN")
    principal = principal_of_token(request, secret.strip())
    if principal.role is Role.DEVICE:
        raise NotAllowedError("a device shows its certificate here", remedy="use the devices' port")
    return principal


def principal_of_token(request: Request, secret: str) -> Principal:
    """Whose token this is; whoever tries too many wrong ones has to wait (`OverloadedError`)."""
    plane, address = plane_of(request), address_of(request)
    plane.guesses.check(address, secret)
    try:
        principal = plane.identity.get_principal(secret)
    except NotAuthenticatedError:
        plane.guesses.note_wrong(address, secret)
        raise
    plane.guesses.note_right(secret)
    return principal


def address_of(request: Request) -> str:
    """The address a request came from."""
    return request.client.host if request.client else ""


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


def decoded(name: str, text: str) -> bytes:
    """The bytes that a field carries in base64; `InvalidInputError` otherwise."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(f"{name} is not base64", remedy="send base64 of the bytes") from error


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
        if isinstance(error.__cause__, ForeshoreError):  # of the shield, met while the framework read the body
            return problem(error.__cause__)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_input")
        body = {"type": "about:blank", "title": str(error.detail), "status": error.status_code,
                "detail": str(error.detail), "code": code, "remedy": "see /api/docs"}  # fmt: skip
        return JSONResponse(body, error.status_code, error.headers, media_type="application/problem+json")

    app.add_exception_handler(ForeshoreError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def arriving(request: Request) -> Iterator[bytes]:
    """The body as it comes in, for a worker thread: streamed, never held."""
    pieces = request.stream()

    async def following() -> bytes | None:
        async for piece in pieces:
            return piece
        return None

    while (piece := anyio.from_thread.run(following)) is not None:
        yield piece
