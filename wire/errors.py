"""The error tree of every Foreshore process.

Each error carries a stable `code` (crosses process boundaries, appears in device reports and API bodies), a sentence
that names the value at fault, and a `remedy` (what to do next). Standard library only: the serving engine imports
this on machines that have neither pydantic nor FastAPI.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ForeshoreError(Exception):
    """Base of every error that Foreshore raises on purpose.

    `http_status` is what an API answers when nothing more precise is known.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, remedy: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data: code, message, remedy, details."""
        return {"code": self.code, "message": self.message, "remedy": self.remedy, "details": self.details}


class InvalidInputError(ForeshoreError):
    """A value from outside is wrong; nothing was changed."""

    code = "invalid_input"
    http_status = 422


class UnknownVersionError(InvalidInputError):
    """A message states a schema or version that this build does not speak."""

    code = "unknown_version"
    http_status = 400


class TooLargeError(InvalidInputError):
    """Input exceeds a size limit; it was refused before it was parsed."""

    code = "too_large"
    http_status = 413


class UnsupportedModelError(InvalidInputError):
    """The source model cannot be accepted: format, missing part, pickle, unknown operator."""

    code = "unsupported_model"


class NotFoundError(ForeshoreError):
    """The named thing does not exist, or the caller may not know that it does."""

    code = "not_found"
    http_status = 404


class ConflictError(ForeshoreError):
    """The thing changed meanwhile, or its state does not allow this."""

    code = "conflict"
    http_status = 409


class NotAuthenticatedError(ForeshoreError):
    """No credential, or one that nobody issued or that has expired."""

    code = "not_authenticated"
    http_status = 401


class NotAllowedError(ForeshoreError):
    """The credential is good, but its role does not cover this."""

    code = "not_allowed"
    http_status = 403


class IntegrityError(ForeshoreError):
    """Bytes do not have the digest, length or signature they should have."""

    code = "integrity"
    http_status = 422


class SignatureError(IntegrityError):
    """A signature is missing, by an unknown key, or wrong."""

    code = "bad_signature"


class RequestTimeoutError(ForeshoreError):
    """A client did not send the rest of its request in time."""

    code = "request_timeout"
    http_status = 408


class AbortedError(ForeshoreError):
    """Somebody ended the request before its answer."""

    code = "aborted"
    http_status = 499


class InsufficientSpaceError(ForeshoreError):
    """Disk or memory does not suffice; details give `needed_bytes` and `free_bytes`."""

    code = "insufficient_space"
    http_status = 507


class GateFailedError(ForeshoreError):
    """An accuracy, latency or memory gate was not met; the artefact is not published."""

    code = "gate_failed"
    http_status = 422


class UnavailableError(ForeshoreError):
    """A neighbour cannot be reached or is overloaded; trying later may work."""

    code = "unavailable"
    http_status = 503


class OverloadedError(UnavailableError):
    """A queue is full. `details["retry_after_s"]` comes from the real queue."""

    code = "overloaded"
    http_status = 429


class TimedOutError(UnavailableError):
    """A wait ended without an answer."""

    code = "timed_out"
    http_status = 504


class MissingExtraError(ForeshoreError):
    """An optional dependency is absent; the remedy names the pip line."""

    code = "missing_extra"
    http_status = 501

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"the package {package!r} is not installed", remedy=f"pip install 'foreshore[{extra}]'")
