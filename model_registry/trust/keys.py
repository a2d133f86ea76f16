"""Ed25519 keys: private ones in files, public ones as text and as TUF keys.

A private key stays in one PEM file (PKCS 8, mode 0600, passphrase if wanted) on its owner's machine; this file never
talks to a network. TUF names a key by the digest of its description, the wire's envelopes by the digest of its bytes.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from wire.envelope import key_id, public_key_bytes
from wire.errors import ConflictError, InvalidInputError, NotFoundError, SignatureError
from wire.process import replace_durably

MAX_KEY_FILE_BYTES = 16 * 1024


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


def tuf_key(key: Ed25519PublicKey) -> SSlibKey:
    """The key as metadata names it."""
    return SSlibKey.from_crypto(key)


def tuf_signer(key: Ed25519PrivateKey) -> CryptoSigner:
    """The key as it signs metadata."""
    return CryptoSigner(key, tuf_key(key.public_key()))


def envelope_keys(keys: Iterable[Key]) -> dict[str, Ed25519PublicKey]:
    """TUF keys as those that `wire.envelope.open_envelope` takes; keys of other kinds sign no envelopes."""
    found = {}
    for key in keys:
        if key.keytype == "ed25519":
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.keyval["public"]))
            found[key_id(public)] = public
    return found
