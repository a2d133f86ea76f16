"""What a device shows to prove who it is: a private key made here and the certificate that the control plane gave it.

Both are in one file, `device.pem`, so that replacing them is one rename: whenever the process is killed, the file holds
a key with its own certificate. Where the key really lives is the `KeyStore`'s business; `FileKeys` keeps it in that
file (0600), `pkcs11_keys` in a security chip. Every connection of the agent, MQTT or HTTPS, uses one TLS context that
trusts the control plane's authority and nobody else.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edge_agent.config import Home
from wire.errors import InvalidInputError
from wire.process import replace_durably

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

RENEW_AT = 2 / 3  # of a certificate's life


class KeyStore(Protocol):
    """Private keys, each known by a text of one or more lines that may stand before a certificate in a file."""

    def create(self) -> str:
        """Make a key and return its text; the key survives a crash if the text does."""
        ...

    def request(self, key_text: str) -> str:
        """A certificate request (PKCS 10, PEM) signed by the key."""
        ...

    def public_bytes(self, key_text: str) -> bytes:
        """The public key (SubjectPublicKeyInfo, DER)."""
        ...

    def load(self, context: ssl.SSLContext, file: Path) -> None:
        """Have new connections of `context` use the key and certificate in `file`."""
        ...


class FileKeys:
    """ECDSA P-256 keys whose text is the key itself (PKCS 8, PEM)."""

    def create(self) -> str:
        """See `KeyStore`."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = ec.generate_private_key(ec.SECP256R1())
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def request(self, key_text: str) -> str:
        """See `KeyStore`."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.serialization import Encoding

        key = private_key(key_text)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "device")])  # the control plane knows the name
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        return request.public_bytes(Encoding.PEM).decode()

    def public_bytes(self, key_text: str) -> bytes:
        """See `KeyStore`."""
        return _spki(private_key(key_text).public_key())

    def load(self, context: ssl.SSLContext, file: Path) -> None:
        """See `KeyStore`."""
        context.load_cert_chain(str(file))


def open_keys(home: Home) -> KeyStore:
    """The key store that this device enrolled with."""
    chip = home.chip()
    if chip is None:
        return FileKeys()
    from edge_agent.pkcs11_keys import Pkcs11Keys

    return Pkcs11Keys(chip)


class Credentials:
    """The device's key and certificate in the home folder, and the TLS context made of them."""

    def __init__(self, home: Home, keys: KeyStore) -> None:
        self._file, self._keys = home.certificate_file, keys
        try:
            self.context = ssl.create_default_context(cafile=str(home.ca_file))
            self.reload()
        except (OSError, ssl.SSLError, ValueError) as error:
            raise InvalidInputError(f"{self._file} is no key and certificate: {error}", remedy="enrol again") from error

    def reload(self) -> None:
        """Use what is in the file now; connections that are open keep what they began with."""
        from cryptography import x509

        self._keys.load(self.context, self._file)
        self.certificate: x509.Certificate = x509.load_pem_x509_certificate(self._file.read_bytes())

    @property
    def renew_at(self) -> datetime:
        """When the certificate has lived two thirds of its life."""
        begin, end = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        return begin + (end - begin) * RENEW_AT

    def is_due(self) -> bool:
        """Whether it is time for the next certificate."""
        return datetime.now(UTC) >= self.renew_at

    def is_for(self, key_text: str) -> bool:
        """Whether the certificate in use belongs to this key."""
        return _spki(self.certificate.public_key()) == self._keys.public_bytes(key_text)

    def replace(self, key_text: str, certificate_pem: str) -> None:
        """Make this key and certificate the device's own, durably; refuses a certificate of another key."""
        store(self._file, self._keys, key_text, certificate_pem)
        self.reload()


def store(file: Path, keys: KeyStore, key_text: str, certificate_pem: str) -> None:
    """Write key and certificate as one file. Raises `InvalidInputError` when they do not belong together."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        fits = _spki(certificate.public_key()) == keys.public_bytes(key_text)
    except ValueError as error:
        raise InvalidInputError("the control plane sent no certificate", remedy="check --url") from error
    if not fits:
        raise InvalidInputError("the control plane's certificate is for another key", remedy="try again")
    replace_durably(file, f"{key_text.rstrip()}\n{certificate_pem}".encode(), mode=0o600)


def private_key(key_text: str, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """The key in a text, opened with its passphrase where it has one."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(key_text.encode(), passphrase)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInputError("the device's key is not an ECDSA key", remedy="enrol again")
    return key


def _spki(key: object) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))  # type: ignore[attr-defined]
