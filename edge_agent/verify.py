"""Assignment -> listed release -> manifest by digest: nothing unproven reaches a parser of content.

Two parties must agree before anything is installed. The director (online) assigns a release to this device; a publisher
(offline) lists that release's digest. `DeviceTrust` keeps the device's TUF metadata and asks it both questions; an
assignment must besides be for this device and not be older than the last one. What runs already asks nobody.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile, Targets

from edge_agent.config import Home, Identity
from model_registry.manifest import Manifest, Release, ReleaseArtefact, parse_manifest, parse_release
from model_registry.trust.client import TrustClient
from model_registry.trust.clock import BUILT_AT, TrustedClock
from model_registry.trust.errors import MetadataUnavailableError
from model_registry.trust.keys import envelope_keys
from model_registry.trust.roles import DIRECTOR, delegated_keys, release_path
from model_registry.trust.source import HttpSource, MetadataSource
from wire.envelope import open_envelope, parse_envelope
from wire.errors import ForeshoreError, IntegrityError, SignatureError
from wire.messages import DESIRED_TYPE, Desired, parse

MAX_DESIRED_BYTES = 24 * 1024


class RefusedError(ForeshoreError):
    """A properly signed document that must not be followed: for another device, older, for another target."""

    code = "refused"


class WishExpiredError(RefusedError):
    """The assignment has expired: nothing new is installed by it; a newer one may be the same."""

    code = "expired_wish"


@dataclass(frozen=True)
class Director:
    """Who may assign: keys by the envelope's key ids, and how many must sign."""

    keys: Mapping[str, Ed25519PublicKey]
    threshold: int


class DeviceTrust:
    """The device's view of the repository. Methods block on network and disk; attributes never do.

    `error` says why the last refresh failed; `num_renewals` rises with every refresh that brought news or ended a lack.
    """

    def __init__(self, client: TrustClient) -> None:
        self._client = client
        self.error: ForeshoreError | None = None
        self.num_renewals = 0

    def now(self) -> datetime:
        """The time that expiry is judged by."""
        return self._client.now

    def refresh(self, source: MetadataSource | None = None) -> None:
        """Follow the source to its newest state."""
        before = self._client.news_id
        was_lacking = self.error is not None
        try:
            self._client.refresh(source)
        except ForeshoreError as error:
            self.error = error
            raise
        self.error = None
        if was_lacking or self._client.news_id != before:
            self.num_renewals += 1

    def director(self) -> Director:
        """Who may assign now; raises a `TrustError` when what is trusted has expired."""
        view = self._client.view
        view.require_fresh((Targets.type, "root"))
        return _director(view.targets)

    def find_release(self, model: str, digest: str, stick: MetadataSource | None = None) -> TargetFile:
        """What a publisher says about a release, as of now; `NotListedError` when none lists it.

        Without an answer from the control plane, what was accepted earlier (from a stick, perhaps) counts for as long
        as it has not expired.
        """
        try:
            self.refresh()
        except MetadataUnavailableError:
            return self.find_listed(model, digest, stick)
        return self.find_listed(model, digest)

    def find_listed(self, model: str, digest: str, source: MetadataSource | None = None) -> TargetFile:
        """As `find_release`, by what was accepted last."""
        self._client.view.require_fresh((Targets.type, "root"))
        return self._client.get_target(release_path(model, digest), source)


def open_trust(
    home: Home, identity: Identity, tls: ssl.SSLContext | bool = True, clock: TrustedClock | None = None
) -> DeviceTrust:
    """The trust of an enrolled device: metadata below its home, news from its control plane."""
    source = HttpSource(f"{identity.control_url}/api/v1/trust/metadata", verify=tls)
    floor = max(BUILT_AT, identity.trust.time)
    return DeviceTrust(TrustClient(home.trust, source, clock or TrustedClock(not_before=floor)))


def open_desired(envelope: bytes, director: Director, *, tenant: str, device_id: str, last_generation: int) -> Desired:
    """The wish inside `envelope`; raises `SignatureError` or `RefusedError`."""
    payload = open_envelope(
        envelope, DESIRED_TYPE, director.keys, threshold=director.threshold, max_bytes=MAX_DESIRED_BYTES
    )
    desired = parse(Desired, payload)
    if (desired.tenant, desired.device_id) != (tenant, device_id):
        raise RefusedError(f"the wish is for {desired.tenant}.{desired.device_id}", remedy="sign one for this device")
    if desired.generation < last_generation:
        raise RefusedError(
            f"generation {desired.generation} is older than {last_generation}", remedy="publish a newer one"
        )
    return desired


def recall_desired(envelope: bytes) -> Desired:
    """A wish that this device accepted and stored itself. It tells what was wished, and starts nothing."""
    return parse(Desired, parse_envelope(envelope, max_bytes=MAX_DESIRED_BYTES).payload)


def signers(envelope: bytes) -> set[str]:
    """Key ids that an envelope claims to be signed by."""
    return {one.key_id for one in parse_envelope(envelope, max_bytes=MAX_DESIRED_BYTES).signatures}


def check_fresh(desired: Desired, now: datetime) -> None:
    """Refuse to install from a wish that has expired."""
    if now > desired.expires_at:
        raise WishExpiredError(
            f"the wish expired at {desired.expires_at:%Y-%m-%d %H:%M} UTC", remedy="publish a newer one"
        )


def open_release(
    data: bytes, listed: TargetFile, *, digest: str, tenant: str, name: str, manifest: str, target: str
) -> tuple[Release, ReleaseArtefact]:
    """The listed release that the wish names, and its artefact for this device."""
    try:
        listed.verify_length_and_hashes(data)
    except LengthOrHashMismatchError as error:
        raise IntegrityError(f"the release is not as listed: {error}", remedy="fetch it again") from error
    release = parse_release(data, expected_digest=digest)
    if (release.tenant, release.name) != (tenant, name):
        raise SignatureError(f"the release is of {release.tenant}/{release.name}", remedy=f"wanted {tenant}/{name}")
    for artefact in release.artefacts:
        if artefact.manifest == manifest and artefact.target == target:
            return release, artefact
    raise IntegrityError(f"the release names no artefact {manifest[:12]} for {target}", remedy="publish it again")


def open_manifest(data: bytes, digest: str, name: str, artefact: ReleaseArtefact) -> Manifest:
    """The manifest that the listed release names; length and digest first, then parsing, then what it says."""
    if len(data) != artefact.manifest_bytes:
        raise IntegrityError(f"manifest {digest[:12]} has {len(data)} bytes", remedy="fetch it again")
    manifest = parse_manifest(data, expected_digest=digest)
    said = (manifest.name, manifest.target, manifest.runtime, manifest.size_bytes)
    if said != (name, artefact.target, artefact.runtime, artefact.size_bytes):
        raise IntegrityError(f"manifest {digest[:12]} contradicts its release", remedy="publish it again")
    return manifest


def _director(targets: Targets) -> Director:
    keys, threshold = delegated_keys(targets, DIRECTOR)
    return Director(envelope_keys(keys), threshold)
