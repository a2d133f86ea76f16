"""Why metadata is not believed: one error per attack or defect, each with the code that the device reports.

Standard library and the error tree only, so that whoever maps codes need not import TUF.
"""

from __future__ import annotations

from wire.errors import IntegrityError, UnavailableError


class TrustError(IntegrityError):
    """Metadata that must not be followed."""

    code = "untrusted_metadata"


class ForgedError(TrustError):
    """Too few good signatures by the keys that the delegating role names."""

    code = "forged_metadata"


class RolledBackError(TrustError):
    """Older than what was accepted before."""

    code = "rolled_back_metadata"


class FrozenError(TrustError):
    """What the online roles serve has expired although they renew it all the time: newer metadata is held back."""

    code = "frozen_metadata"


class MixedError(TrustError):
    """Genuine parts of different states: not the version, length or digest that the role above lists."""

    code = "mixed_metadata"


class ExpiredError(TrustError):
    """An offline role has expired, or what was accepted has and no newer can be had."""

    code = "expired_metadata"


class OversizedError(TrustError):
    """Announced or stored with more bytes than the limit; not read."""

    code = "oversized_metadata"


class EndlessError(TrustError):
    """More bytes arrived than were announced or allowed; reading stopped there."""

    code = "endless_metadata"


class SlowError(TrustError):
    """Bytes drip so slowly that waiting serves only whoever sends them."""

    code = "slow_metadata"


class MalformedError(TrustError):
    """Not metadata at all, of another role, or encoded in a way nobody asked for."""

    code = "malformed_metadata"


class NotListedError(TrustError):
    """No offline targets role lists this, whoever assigned it."""

    code = "release_not_listed"


class MetadataUnavailableError(UnavailableError):
    """No metadata and no answer; says nothing about trust."""

    code = "metadata_unavailable"


class SupersededError(MetadataUnavailableError):
    """A listed version is gone: the repository moved on between two requests. Starting again settles it."""


PASSING = frozenset(
    kind.code
    for kind in (
        ForgedError, RolledBackError, FrozenError, MixedError, ExpiredError, OversizedError, EndlessError, SlowError,
        MalformedError, NotListedError, MetadataUnavailableError,
    )
)  # fmt: skip
"""Codes that say something about the way, not about the model: once honest metadata arrives the update may go on."""

REFUSALS = PASSING - {MetadataUnavailableError.code}
