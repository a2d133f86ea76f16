"""Private keys that work only on this device: encrypted with a secret that never leaves its security chip (PKCS#11).

The chip (a TPM by tpm2-pkcs11, a smart card, SoftHSM) holds a non-extractable secret; HMAC-SHA256 of a salt with it is
the passphrase of the key's PKCS 8 text (PBES2). A copy of the home folder is worth nothing without the chip. While the
agent runs, the opened key is in its memory: TLS itself cannot be done by the chip here, because Python's `ssl` takes
private keys from files only (`load_cert_chain`; no engine, no provider, no URI).
"""

from __future__ import annotations

import re
import secrets
import ssl
from pathlib import Path
from typing import Any

from edge_agent.config import ChipSettings
from edge_agent.credentials import FileKeys, private_key
from wire.errors import InvalidInputError, MissingExtraError, UnavailableError

SECRET_LABEL = "foreshore-device"
SALT_BYTES = 32
_SALT = re.compile(r"^foreshore-salt: ([0-9a-f]{64})$", re.MULTILINE)


class Pkcs11Keys:
    """A `KeyStore` whose texts are encrypted keys that only this chip opens."""

    def __init__(self, settings: ChipSettings) -> None:
        self._settings = settings
        self._pkcs11 = _library()

    def create(self) -> str:
        """See `KeyStore`."""
        from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

        salt = secrets.token_hex(SALT_BYTES)
        encryption = BestAvailableEncryption(self._passphrase(salt, may_create=True))
        key = private_key(FileKeys().create())
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode()
        return f"foreshore-salt: {salt}\n{text}"

    def request(self, key_text: str) -> str:
        """See `KeyStore`."""
        return FileKeys().request(self._opened(key_text))

    def public_bytes(self, key_text: str) -> bytes:
        """See `KeyStore`."""
        return FileKeys().public_bytes(self._opened(key_text))

    def load(self, context: ssl.SSLContext, file: Path) -> None:
        """See `KeyStore`."""
        context.load_cert_chain(str(file), password=self._passphrase(_salt_of(file.read_text())))

    def _opened(self, key_text: str) -> str:
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = private_key(key_text, self._passphrase(_salt_of(key_text)))
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def _passphrase(self, salt: str, *, may_create: bool = False) -> bytes:
        settings, pkcs11 = self._settings, self._pkcs11
        try:
            token = pkcs11.lib(str(settings.module)).get_token(token_label=settings.token)
            with token.open(user_pin=settings.pin_file.read_text().strip(), rw=may_create) as session:
                secret = self._secret(session, may_create)
                return bytes(secret.sign(bytes.fromhex(salt), mechanism=pkcs11.Mechanism.SHA256_HMAC)).hex().encode()
        except pkcs11.PKCS11Error as error:
            raise UnavailableError(
                f"the security chip {settings.token!r} does not open the key: {error!r}", remedy="check module and PIN"
            ) from error

    def _secret(self, session: Any, may_create: bool) -> Any:
        pkcs11 = self._pkcs11
        try:
            return session.get_key(object_class=pkcs11.ObjectClass.SECRET_KEY, label=SECRET_LABEL)
        except pkcs11.NoSuchKey:
            if not may_create:
                raise
        kept = pkcs11.Attribute
        attributes = {kept.SENSITIVE: True, kept.EXTRACTABLE: False, kept.SIGN: True}
        return session.generate_key(
            pkcs11.KeyType.GENERIC_SECRET, 256, label=SECRET_LABEL, store=True, template=attributes,
            mechanism=pkcs11.Mechanism.GENERIC_SECRET_KEY_GEN, capabilities=pkcs11.MechanismFlag.SIGN,
        )  # fmt: skip


def _salt_of(text: str) -> str:
    found = _SALT.search(text)
    if found is None:
        raise InvalidInputError("the key was not made with a security chip", remedy="enrol again")
    return found[1]


def _library() -> Any:
    try:
        import pkcs11
    except ModuleNotFoundError as error:
        raise MissingExtraError("python-pkcs11", "pkcs11") from error
    return pkcs11
