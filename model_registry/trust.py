"""Who may say that a release exists: Ed25519 keys in files, rings of trusted public keys, signing and verifying.

A publisher's private key stays in one PEM file (PKCS 8, mode 0600, passphrase if wanted) on the publisher's machine.
Devices and the control plane hold a `KeyRing` of public keys. Callers ask a `ReleaseVerifier`; today that is a ring of
keys, a TUF client can take its place without touching them. This file never talks to a network.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from model_registry.manifest import MAX_RELEASE_BYTES, Release, parse_release
from wire.envelope import key_id, open_envelope, public_key_bytes, sign
from wire.errors import ConflictError, IntegrityError, InvalidInputError, NotFoundError, SignatureError
from wire.messages import RELEASE_TYPE
from wire.process import replace_durably

MAX_KEY_FILE_BYTES = 16 * 1024
MAX_SIGNED_RELEASE_BYTES = MAX_RELEASE_BYTES * 4 // 3 + 8192


class ReleaseVerifier(Protocol):
    """Tells a release that may be installed from one that may not."""

    def verify_release(self, envelope: bytes) -> Release:
        """Return the release inside `envelope`; raise `SignatureError` when nobody trusted stands behind it."""


@dataclass(frozen=True)
class KeyRing(Mapping[str, Ed25519PublicKey]):
    """Trusted public keys by key id; at least `threshold` of them must have signed."""

    keys_by_id: Mapping[str, Ed25519PublicKey]
    threshold: int = 1

    def __getitem__(self, name: str) -> Ed25519PublicKey:
        return self.keys_by_id[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_by_id)

    def __len__(self) -> int:
        return len(self.keys_by_id)

    def verify_release(self, envelope: bytes) -> Release:
        """Return the release inside `envelope` if enough keys of this ring signed it."""
        return verify_release(envelope, self.keys_by_id, threshold=self.threshold)

    def to_dict(self) -> dict[str, str]:
        """The ring as `{key_id: base64 of the 32 raw bytes}`, as enrolment hands it out."""
        return {name: encode_public_key(key) for name, key in self.keys_by_id.items()}


def key_ring(keys: Mapping[str, str] | list[str], *, threshold: int = 1) -> KeyRing:
    """Make a ring from base64 public keys; a mapping's key ids must be the digests of their keys."""
    encoded = list(keys.values()) if isinstance(keys, Mapping) else keys
    found = {key_id(key): key for key in map(decode_public_key, encoded)}
    if isinstance(keys, Mapping) and set(keys) != set(found):
        wrong = sorted(set(keys) - set(found))
        raise InvalidInputError(f"key id {wrong} does not belong to its key", remedy="the id is the key's SHA-256")
    return KeyRing(found, threshold)


def encode_public_key(key: Ed25519PublicKey) -> str:
    """The 32 raw bytes in base64."""
    return base64.b64encode(public_key_bytes(key)).decode()


def decode_public_key(text: str) -> Ed25519PublicKey:
    """Read 32 raw bytes in base64."""
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(
            f"public key {text[:60]!r} is not an Ed25519 key", remedy="give the 32 raw bytes in base64"
        ) from error


def create_key(path: Path, passphrase: str | None = None) -> Ed25519PrivateKey:
    """Make a new private key and write it to `path` (0600). An existing file is never overwritten."""
    if path.exists():
        raise ConflictError(f"{path} exists", remedy="choose another path, or remove the old key yourself")
    key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    replace_durably(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), mode=0o600)
    return key


def load_key(path: Path, passphrase: str | None = None) -> Ed25519PrivateKey:
    """Read a private key. A file that others may read is refused: its key may be known to them."""
    try:
        mode = path.stat().st_mode
        if os.name == "posix" and mode & 0o077:
            raise SignatureError(f"{path} may be read by others (mode {mode & 0o777:o})", remedy=f"chmod 600 {path}")
        with path.open("rb") as file:
            pem = file.read(MAX_KEY_FILE_BYTES)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no key at {path}", remedy="create one: foreshore keys create") from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}", remedy="give a PEM file") from error
    try:
        key = load_pem_private_key(pem, passphrase.encode() if passphrase else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInputError(
            f"{path} cannot be opened: {error}", remedy="give the right passphrase and a PEM file"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInputError(f"{path} holds another kind of key", remedy="an Ed25519 key is wanted")
    return key


def sign_release(release: Release, key: Ed25519PrivateKey) -> bytes:
    """The signed envelope of `release`, as it is stored and sent."""
    return sign(RELEASE_TYPE, release.to_bytes(), key).to_bytes()


def verify_release(
    envelope: bytes,
    trusted: Mapping[str, Ed25519PublicKey],
    *,
    threshold: int = 1,
    expected_digest: str | None = None,
) -> Release:
    """Return the release inside `envelope` if `threshold` trusted keys signed it.

    With `expected_digest` it must be that very release (what a desired state names). The bytes must be the canonical
    ones, so that a release has one digest only.
    """
    payload = open_envelope(envelope, RELEASE_TYPE, trusted, threshold=threshold, max_bytes=MAX_SIGNED_RELEASE_BYTES)
    release = parse_release(payload, expected_digest=expected_digest)
    if release.to_bytes() != payload:
        raise IntegrityError("release is not in canonical form", remedy="sign the bytes the control plane offers")
    return release
