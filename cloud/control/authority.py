"""The control plane's own certificate authority, in a folder: it vouches for the broker, the control plane and devices.

Keys are ECDSA P-256 (small devices shake hands quickly); private keys are 0600. A device's private key is made on the
device: only its certificate request comes here, and of that request only the public key is believed. A certificate's
common name is the broker's user name, `{tenant}.{device}`.
"""

from __future__ import annotations

import ipaddress
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
DEVICE_DAYS = 365
MAX_CSR_BYTES = 16 * 1024
SKEW = timedelta(minutes=5)  # a device's clock may be a little behind

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True)
class Issued:
    """A new certificate."""

    certificate_pem: str
    serial: str


class Authority:
    """A certificate authority whose files live in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca_file = folder / "ca.pem"
        self._key, self._certificate = self._open()

    @property
    def ca_pem(self) -> str:
        """The authority's own certificate, which devices trust."""
        return self.ca_file.read_text()

    def ensure_server(self, hosts: list[str]) -> tuple[Path, Path]:
        """Certificate and key files of the broker, good for `hosts`; made anew when the hosts change or it gets old."""
        certificate, key = self.folder / "server.pem", self.folder / "server.key"
        if not self._is_good(certificate, key, hosts):
            private = ec.generate_private_key(ec.SECP256R1())
            issued = self._issue("broker", private.public_key(), SERVER_DAYS, hosts=hosts)
            _write_key(key, private)
            replace_durably(certificate, issued.certificate_pem.encode())
        return certificate, key

    def ensure_client(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files of one of our own MQTT clients."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        if not self._is_good(certificate, key, []):
            private = ec.generate_private_key(ec.SECP256R1())
            issued = self._issue(name, private.public_key(), SERVER_DAYS)
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
        return self._issue(user, public_key, DEVICE_DAYS)

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

    def _issue(self, name: str, public_key: PublicKey, days: int, hosts: list[str] | None = None) -> Issued:
        now = datetime.now(UTC)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(_alternatives(hosts)), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = certificate.public_bytes(Encoding.PEM).decode()
        return Issued(certificate_pem=pem, serial=f"{certificate.serial_number:x}")

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
