"""What a command's exit code says: 0 done, 1 failed, 2 input, 3 not reachable, 4 refused, 5 a check did not hold."""

from __future__ import annotations

from wire.errors import (
    ForeshoreError,
    GateFailedError,
    IntegrityError,
    InvalidInputError,
    MissingExtraError,
    NotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
    UnavailableError,
)

FAILED = 1
UNREACHABLE = 3
INTERRUPTED = 130

_CODE_BY_ERROR: tuple[tuple[type[ForeshoreError], int], ...] = (
    (GateFailedError, 5),
    (IntegrityError, 5),
    (NotAuthenticatedError, 4),
    (NotAllowedError, 4),
    (UnavailableError, UNREACHABLE),
    (InvalidInputError, 2),
    (NotFoundError, 2),
    (MissingExtraError, 2),
)


def exit_code(error: BaseException) -> int:
    """The exit code for a command that ended with `error`."""
    return next((code for kind, code in _CODE_BY_ERROR if isinstance(error, kind)), FAILED)
