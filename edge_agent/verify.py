"""Signed wish -> signed release -> manifest by digest: nothing unsigned reaches a parser of content.

The wish must be signed by a control key, be meant for this device and not be older than the last one accepted. The
release must be signed by a publisher, and be the very one the wish names; an expired wish installs nothing new, while
what runs keeps running. Going back to an older release is allowed only because a newer signed wish says so.
"""

from __future__ import annotations

from datetime import datetime

from model_registry.manifest import Manifest, Release, ReleaseArtefact, parse_manifest
from model_registry.trust import KeyRing, verify_release
from wire.envelope import open_envelope
from wire.errors import ForeshoreError, IntegrityError, SignatureError
from wire.messages import DESIRED_TYPE, Desired, parse

MAX_DESIRED_BYTES = 24 * 1024


class RefusedError(ForeshoreError):
    """A properly signed document that must not be followed: for another device, older, expired."""

    code = "refused"


def open_desired(envelope: bytes, control: KeyRing, *, tenant: str, device_id: str, last_generation: int) -> Desired:
    """The wish inside `envelope`; raises `SignatureError` or `RefusedError`."""
    payload = open_envelope(envelope, DESIRED_TYPE, control, threshold=control.threshold, max_bytes=MAX_DESIRED_BYTES)
    desired = parse(Desired, payload)
    if (desired.tenant, desired.device_id) != (tenant, device_id):
        raise RefusedError(f"the wish is for {desired.tenant}.{desired.device_id}", remedy="sign one for this device")
    if desired.generation < last_generation:
        raise RefusedError(
            f"generation {desired.generation} is older than {last_generation}", remedy="publish a newer one"
        )
    return desired


def check_fresh(desired: Desired, now: datetime) -> None:
    """Refuse to install from a wish that has expired."""
    if now > desired.expires_at:
        raise RefusedError(f"the wish expired at {desired.expires_at:%Y-%m-%d %H:%M} UTC", remedy="publish a newer one")


def open_release(
    envelope: bytes, publishers: KeyRing, *, digest: str, tenant: str, name: str, manifest: str, target: str
) -> tuple[Release, ReleaseArtefact]:
    """The release that the wish names and its artefact for this device."""
    release = verify_release(envelope, publishers, threshold=publishers.threshold, expected_digest=digest)
    if (release.tenant, release.name) != (tenant, name):
        raise SignatureError(f"the release is of {release.tenant}/{release.name}", remedy=f"wanted {tenant}/{name}")
    for artefact in release.artefacts:
        if artefact.manifest == manifest and artefact.target == target:
            return release, artefact
    raise IntegrityError(f"the release names no artefact {manifest[:12]} for {target}", remedy="publish it again")


def open_manifest(data: bytes, digest: str, name: str, artefact: ReleaseArtefact) -> Manifest:
    """The manifest named by the signed release; digest first, then parsing, then whether it says the same."""
    manifest = parse_manifest(data, expected_digest=digest)
    said = (manifest.name, manifest.target, manifest.runtime, manifest.size_bytes)
    if said != (name, artefact.target, artefact.runtime, artefact.size_bytes):
        raise IntegrityError(f"manifest {digest[:12]} contradicts its release", remedy="publish it again")
    return manifest
