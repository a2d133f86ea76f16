"""Enrolment: make a key that never leaves the device, send a certificate request and the one-time token, keep what
comes back (0600).

The token's second part is the fingerprint of the authority that the control plane must show: the device asks for the
authority's certificate first, sends the secret only to a server that this authority vouches for, and never in the open
to another machine.
"""

from __future__ import annotations

import hashlib
import ssl
from base64 import b64decode, urlsafe_b64encode
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from edge_agent.config import Home, Identity, Profile
from edge_agent.credentials import KeyStore, store
from edge_agent.hardware import find_hardware
from model_registry.trust.client import TrustClient
from model_registry.trust.clock import TrustedClock
from model_registry.trust.trusted import TrustedSet
from wire.errors import ConflictError, InvalidInputError, NotAuthenticatedError, UnavailableError
from wire.exposure import is_loopback
from wire.messages import Hardware
from wire.process import replace_durably

TIMEOUT_S = 20.0


def enrol(home: Home, url: str, token: str, profile: Profile, keys: KeyStore, *, root: bytes | None = None) -> Identity:
    """Trade `token` for an identity; everything is on disk when this returns, the identity last.

    `root` is a root of trust that came another way and is believed instead of the control plane's.
    """
    if home.identity_file.exists():
        raise ConflictError(f"{home.path} is enrolled already", remedy="use another folder or delete this one")
    home.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    tls = _trusted(url.rstrip("/"), token)
    key = keys.create()
    answer = _post(url, token, keys.request(key), find_hardware(profile, home.path), tls)
    try:
        identity = Identity(
            tenant=answer["tenant"],
            device_id=answer["device_id"],
            control_url=answer.get("control_url") or url.rstrip("/"),
            gateway_url=answer.get("gateway_url"),
            device_token=answer["device_token"],
            mqtt=answer["mqtt"],
            trust=answer["trust"],
        )
        certificate, authority = str(answer["certificate_pem"]), str(answer["ca_pem"])
        trusted_root = root or b64decode(identity.trust.root, validate=True)
        TrustedSet(trusted_root, TrustedClock())
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise InvalidInputError(f"the control plane's answer is malformed: {error}", remedy="check --url") from error
    document = yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False)
    store(home.certificate_file, keys, key, certificate)
    files: list[tuple[Path, bytes]] = [
        (home.ca_file, authority.encode()),
        (home.profile_file, document.encode()),
        (home.identity_file, identity.model_dump_json(indent=1).encode()),
    ]
    TrustClient.initialise(home.trust, trusted_root)
    for path, data in files:
        replace_durably(path, data, mode=0o600)
    return identity


def _trusted(url: str, token: str) -> ssl.SSLContext:
    """TLS that believes only the authority whose fingerprint the token carries; without one, the system's."""
    address = urlsplit(url)
    if address.scheme != "https":
        if address.scheme != "http" or not is_loopback(address.hostname or ""):
            raise InvalidInputError(f"{url} would carry the token in the open", remedy="use the https address")
        return ssl.create_default_context()
    pin = token.partition(".")[2]
    if not pin:
        return ssl.create_default_context()
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE  # what comes back is checked by its digest
    try:
        answer = httpx.get(f"{url}/api/v1/authority", timeout=TIMEOUT_S, verify=unchecked)
        authority = x509.load_pem_x509_certificate(str(answer.json()["ca_pem"]).encode())
    except httpx.HTTPError as error:
        raise UnavailableError(f"{url} does not answer: {error}", remedy="check --url") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{url} shows no authority", remedy="is this the devices' address?") from error
    digest = hashlib.sha256(authority.public_bytes(Encoding.DER)).digest()
    if urlsafe_b64encode(digest).decode().rstrip("=") != pin:
        raise NotAuthenticatedError(
            f"{url} is not the control plane that made this token", remedy="check --url; somebody may be in between"
        )
    return ssl.create_default_context(cadata=authority.public_bytes(Encoding.PEM).decode())


def _post(url: str, token: str, csr_pem: str, hardware: Hardware, tls: ssl.SSLContext) -> dict[str, Any]:
    told = hardware.model_dump(mode="json", exclude_none=True)
    body = {"enrolment_token": token, "csr_pem": csr_pem, "hardware": told}
    try:
        answer = httpx.post(f"{url.rstrip('/')}/api/v1/enrol", json=body, timeout=TIMEOUT_S, verify=tls)
    except httpx.HTTPError as error:
        raise UnavailableError(f"{url} does not answer: {error}", remedy="check --url") from error
    if answer.status_code in {401, 403, 404, 429}:
        raise NotAuthenticatedError(f"the enrolment token is refused: {answer.text[:300]}", remedy="ask for a new one")
    if answer.status_code >= 400:
        raise InvalidInputError(f"enrolment failed ({answer.status_code}): {answer.text[:300]}", remedy="see above")
    return dict(answer.json())
