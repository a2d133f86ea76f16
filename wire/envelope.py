"""Signed envelopes: bytes, what they claim to be, and Ed25519 signatures over both.

The signed bytes are DSSE's pre-authentication encoding (https://github.com/secure-systems-lab/dsse), so a signature
over one type of document never counts for another. `open_envelope` checks size, then signatures, and only then hands
out the payload: nothing unsigned reaches a parser.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from wire.errors import SignatureError, TooLargeError

MAX_ENVELOPE_BYTES = 1 << 20
MAX_SIGNATURES = 16


@dataclass(frozen=True)
class Signature:
    """One Ed25519 signature; `key_id` names the public key by digest."""

    key_id: str
    signature: bytes


@dataclass(frozen=True)
class Envelope:
    """A payload with its type and signatures; what it says is unproven until `open_envelope`."""

    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...]

    def to_bytes(self) -> bytes:
        """The envelope as JSON, as it travels."""
        document = {
            "payloadType": self.payload_type,
            "payload": base64.b64encode(self.payload).decode(),
            "signatures": [{"keyid": s.key_id, "sig": base64.b64encode(s.signature).decode()} for s in self.signatures],
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def with_signature(self, signature: Signature) -> Envelope:
        """The same envelope with one more signature (an older one by the same key gives way)."""
        others = tuple(s for s in self.signatures if s.key_id != signature.key_id)
        return Envelope(self.payload_type, self.payload, (*others, signature))


def key_id(public_key: Ed25519PublicKey) -> str:
    """The name of a public key: SHA-256 of its 32 raw bytes, in hex."""
    return hashlib.sha256(public_key_bytes(public_key)).hexdigest()


def public_key_bytes(public_key: Ed25519PublicKey) -> bytes:
    """The 32 raw bytes of a public key."""
    return public_key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def sign(payload_type: str, payload: bytes, private_key: Ed25519PrivateKey) -> Envelope:
    """Wrap `payload` with one signature."""
    signature = private_key.sign(_signed_bytes(payload_type, payload))
    return Envelope(payload_type, payload, (Signature(key_id(private_key.public_key()), signature),))


def parse_envelope(data: bytes, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> Envelope:
    """Read an envelope without trusting it; malformed or oversized bytes raise."""
    if len(data) > max_bytes:
        raise TooLargeError(f"signed document has {len(data)} bytes", remedy=f"at most {max_bytes} are accepted")
    try:
        document = json.loads(data)
        signatures = document["signatures"]
        if len(signatures) > MAX_SIGNATURES:
            raise SignatureError(f"signed document carries {len(signatures)} signatures", remedy="at most 16")
        return Envelope(
            payload_type=str(document["payloadType"]),
            payload=base64.b64decode(document["payload"], validate=True),
            signatures=tuple(Signature(str(s["keyid"]), base64.b64decode(s["sig"], validate=True)) for s in signatures),
        )
    except (KeyError, TypeError, ValueError, binascii.Error, RecursionError) as error:
        raise SignatureError("signed document is malformed", remedy="fetch it again") from error


def open_envelope(
    data: bytes,
    payload_type: str,
    trusted: Mapping[str, Ed25519PublicKey],
    *,
    threshold: int = 1,
    max_bytes: int = MAX_ENVELOPE_BYTES,
) -> bytes:
    """Return the payload if at least `threshold` different trusted keys signed it as `payload_type`.

    `trusted` maps key ids to public keys. Raises `SignatureError` or `TooLargeError`; the payload is not parsed.
    """
    envelope = parse_envelope(data, max_bytes=max_bytes)
    if envelope.payload_type != payload_type:
        raise SignatureError(f"document is a {envelope.payload_type!r}", remedy=f"a {payload_type!r} is wanted here")
    signed = _signed_bytes(envelope.payload_type, envelope.payload)
    valid = {s.key_id for s in envelope.signatures if s.key_id in trusted and _verifies(trusted[s.key_id], s, signed)}
    if len(valid) < threshold:
        signers = ", ".join(sorted(s.key_id[:12] for s in envelope.signatures)) or "nobody"
        raise SignatureError(
            f"{len(valid)} of {threshold} required signatures are good (signed by {signers})",
            remedy="sign it with a key that this device or server trusts",
        )
    return envelope.payload


def _verifies(public_key: Ed25519PublicKey, signature: Signature, signed: bytes) -> bool:
    try:
        public_key.verify(signature.signature, signed)
    except InvalidSignature:
        return False
    return True


def _signed_bytes(payload_type: str, payload: bytes) -> bytes:
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
