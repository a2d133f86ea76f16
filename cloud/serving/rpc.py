"""Conventions of the engine's gRPC protocol: version, sizes, and how our errors cross it. No torch.

An error travels as a status code plus the JSON of `ForeshoreError.to_dict()` in the status message, so both ends see
the same code, sentence and remedy.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from wire.engine_pb2_grpc import EngineStub
from wire.errors import (
    AbortedError,
    ConflictError,
    ForeshoreError,
    InvalidInputError,
    NotAllowedError,
    NotAuthenticatedError,
    OverloadedError,
    TimedOutError,
    TooLargeError,
    UnavailableError,
    UnknownVersionError,
)

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 16 << 20
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
SERVER_OPTIONS = (*OPTIONS, ("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0))

_CODES: tuple[tuple[type[ForeshoreError], grpc.StatusCode], ...] = (
    (InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TimedOutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (AbortedError, grpc.StatusCode.CANCELLED),
    (ConflictError, grpc.StatusCode.ALREADY_EXISTS),
    (NotAuthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
)
_ERRORS: dict[grpc.StatusCode, type[ForeshoreError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOutError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: AbortedError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.UNAUTHENTICATED: NotAuthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowedError,
}
_BY_CODE = {cls.code: cls for cls in (TooLargeError, UnknownVersionError)}


def check_version(version: int) -> None:
    """Refuse a peer that speaks another protocol version."""
    if version != PROTOCOL_VERSION:
        raise UnknownVersionError(
            f"engine protocol version {version} is unknown", remedy=f"this worker speaks {PROTOCOL_VERSION}"
        )


async def abort(context: Any, error: ForeshoreError) -> None:
    """End an RPC with `error`; raises."""
    code = next((code for cls, code in _CODES if isinstance(error, cls)), grpc.StatusCode.INTERNAL)
    await context.abort(code, json.dumps(error.to_dict()))


def error_from(rpc_error: Any) -> ForeshoreError:
    """The error that a failed call means: the peer's own when it sent one, else by status code."""
    code, details = rpc_error.code(), rpc_error.details() or ""
    cls = _ERRORS.get(code, UnavailableError)
    try:
        data = json.loads(details)
        cls = _BY_CODE.get(data["code"], cls)
        return cls(str(data["message"]), remedy=str(data["remedy"]), **dict(data["details"]))
    except (ValueError, KeyError, TypeError):
        return cls(f"the serving worker failed: {code.name}: {details[:300]}", remedy="see the worker's log")


def credentials_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata that authenticates a call; empty without a token."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def engine_stub(channel: Any) -> Any:
    """The client of `wire/engine.proto` on a channel."""
    return EngineStub(channel)  # type: ignore[no-untyped-call]


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the shared token of the serving tier."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Pass the call on, or answer UNAUTHENTICATED."""
        metadata: Sequence[tuple[str, Any]] = details.invocation_metadata or ()
        given = next((str(value) for name, value in metadata if name == "authorization"), "")
        handler = await continuation(details)
        if handler is None or hmac.compare_digest(given.encode(), self._expected):
            return handler

        async def refuse_one(request: Any, context: Any) -> None:
            await abort(context, _REFUSED)

        async def refuse_stream(request: Any, context: Any) -> Any:
            await abort(context, _REFUSED)
            yield None

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                refuse_stream, handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            refuse_one, handler.request_deserializer, handler.response_serializer
        )


_REFUSED = NotAuthenticatedError("the serving tier's token is missing or wrong", remedy="give --worker-token-file")
