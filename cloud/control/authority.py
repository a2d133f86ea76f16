"""The control plane's own certificate authority, in a folder: it vouches for the broker, the control plane and devices.

Keys are ECDSA P-256 (small devices shake hands quickly); private keys are 0600. A device's private key is made on the
device: only its certificate request comes here, and of that request only the public key is believed. A certificate's
common name is the broker's user name, `{tenant}.{device}`. What is revoked before its time stands in `crl.pem`, which
the broker reads; whether a certificate is known at all is a question for `certificates`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import threading
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wire.errors import InvalidInputError
from wire.process import replace_durably

CONTROL_USER = "control"
AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
DEVICE_LIFETIME = timedelta(days=365)  # renewed at two thirds: what is offline for 120 days still comes back by itself
MAX_CSR_BYTES = 16 * 1024
SKEW = timedelta(minutes=5)  # a device's clock may be a little behind
CRL_DAYS = 3650  # the list is read from a local file: its freshness is the file's, not a date's

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True)
class Issued:
    """A new certificate."""

    certificate_pem: str
    serial: str
    issued_at: datetime
    expires_at: datetime


class Authority:
    """A certificate authority whose files live in one folder."""

    def __init__(self, folder: Path, device_lifetime: timedelta = DEVICE_LIFETIME) -> None:
        self.folder = folder
        self.ca_file = folder / "ca.pem"
        self.crl_file = folder / "crl.pem"
        self._device_lifetime = device_lifetime
        self._key, self._certificate = self._open()
        self._crl_lock = threading.Lock()
        if not self.crl_file.exists():
            self.revoke([])

    @property
    def ca_pem(self) -> str:
        """The authority's own certificate, which devices trust."""
        return self.ca_file.read_text()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate, base64url: what an enrolment token carries to be sure of it."""
        return fingerprint(self._certificate)

    def ensure_server(self, hosts: list[str]) -> tuple[Path, Path]:
        """Certificate and key files of our servers, good for `hosts`; made anew when these change or it gets old."""
        certificate, key = self.folder / "server.pem", self.folder / "server.key"
        if not self._is_good(certificate, key, hosts):
            private = ec.generate_private_key(ec.SECP256R1())
            issued = self._issue("broker", private.public_key(), timedelta(days=SERVER_DAYS), hosts=hosts)
            _write_key(key, private)
            replace_durably(certificate, issued.certificate_pem.encode())
        return certificate, key

    def ensure_client(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files of one of our own MQTT clients."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        if not self._is_good(certificate, key, []):
            private = ec.generate_private_key(ec.SECP256R1())
            issued = self._issue(name, private.public_key(), timedelta(days=SERVER_DAYS))
            _write_key(key, private)
            replace_durably(certificate, issued.certificate_pem.encode())
        return certificate, key

    def issue_device(self, user: str, csr_pem: str) -> Issued:
        """A client certificate named `user` for the key that signed the request. Raises `InvalidInputError`."""
        if len(csr_pem) > MAX_CSR_BYTES:
            raise InvalidInputError(f"certificate request has {len(csr_pem)} characters", remedy="send one small CSR")
        try:
            request = x509.load_pem_x509_csr(csr_pem.encode())
            public_key = request.public_key()
            is_signed = request.is_signature_valid
        except (ValueError, TypeError, InvalidSignature) as error:
            raise InvalidInputError("csr_pem is not a certificate request", remedy="send PEM of PKCS 10") from error
        if not is_signed:
            raise InvalidInputError("the certificate request is not signed by its key", remedy="make a new request")
        if not isinstance(public_key, PublicKey):
            raise InvalidInputError("the key is of an unsupported kind", remedy="use ECDSA P-256 or Ed25519")
        return self._issue(user, public_key, self._device_lifetime)

    def revoke(self, serials: Iterable[str]) -> None:
        """Make the revocation list say exactly `serials`; nothing happens when it says so already.

        Of two lists OpenSSL believes the one with the later date, and dates count seconds: each list is dated at least
        a second after the one before, beginning a day ago so that a burst of revocations does not reach the future.
        """
        wanted = {int(serial, 16) for serial in serials}
        with self._crl_lock:
            now = datetime.now(UTC).replace(microsecond=0)
            dated = now - timedelta(days=1)
            if self.crl_file.exists():
                last = x509.load_pem_x509_crl(self.crl_file.read_bytes())
                if {entry.serial_number for entry in last} == wanted:
                    return
                dated = max(dated, last.last_update_utc + timedelta(seconds=1))
            at = min(dated, now)
            builder = x509.CertificateRevocationListBuilder().issuer_name(self._certificate.subject)
            builder = builder.last_update(at).next_update(now + timedelta(days=CRL_DAYS))
            for serial in sorted(wanted):
                entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build()
                builder = builder.add_revoked_certificate(entry)
            data = builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)
            replace_durably(self.crl_file, data, mode=0o600)

    def _open(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        key_file = self.folder / "ca.key"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if key_file.exists() and self.ca_file.exists():
            key = load_pem_private_key(key_file.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise InvalidInputError(f"{key_file} holds another kind of key", remedy="restore the ECDSA key")
            return key, x509.load_pem_x509_certificate(self.ca_file.read_bytes())
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(key)
        _write_key(key_file, key)
        replace_durably(self.ca_file, certificate.public_bytes(Encoding.PEM))
        return key, certificate

    def _issue(self, name: str, public_key: PublicKey, lifetime: timedelta, hosts: list[str] | None = None) -> Issued:
        now = datetime.now(UTC).replace(microsecond=0)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - min(SKEW, lifetime))
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(_alternatives(hosts)), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = certificate.public_bytes(Encoding.PEM).decode()
        return Issued(pem, f"{certificate.serial_number:x}", now, now + lifetime)

    def _is_good(self, certificate_file: Path, key_file: Path, hosts: list[str]) -> bool:
        if not certificate_file.exists() or not key_file.exists():
            return False
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        if certificate.not_valid_after_utc < datetime.now(UTC) + timedelta(days=30):
            return False
        if not hosts:
            return True
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return set(names) == set(_alternatives(hosts))


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    now, name = datetime.now(UTC), _name("foreshore control plane")
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _name(common_name: str) -> x509.Name:
    # A common name holds at most 64 characters (RFC 5280); `check_user` refuses longer ones before they come here.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, base64url without padding."""
    return urlsafe_b64encode(hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()).decode().rstrip("=")


def check_user(user: str) -> str:
    """Return `user` if it fits into a certificate's common name."""
    if len(user) > 64:
        raise InvalidInputError(
            f"tenant and device together have {len(user) - 1} characters", remedy="63 at most: choose a shorter name"
        )
    return user


def _alternatives(hosts: list[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in sorted(set(hosts)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    replace_durably(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
