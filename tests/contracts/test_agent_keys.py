"""Every `KeyStore`: makes keys that survive a restart, asks for certificates, and opens TLS connections with them."""

from __future__ import annotations

import importlib.util
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509

from cloud.control.authority import Authority
from edge_agent.config import ChipSettings
from edge_agent.credentials import FileKeys, KeyStore, store
from edge_agent.pkcs11_keys import Pkcs11Keys
from wire.errors import InvalidInputError, UnavailableError

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
HAS_CHIP = SOFTHSM.exists() and shutil.which("softhsm2-util") and importlib.util.find_spec("pkcs11")
needs_chip = pytest.mark.skipif(not HAS_CHIP, reason="no SoftHSM (apt install softhsm2) or python-pkcs11")

MakeStore = Callable[[], KeyStore]


@pytest.fixture(scope="module")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChipSettings]:
    folder = tmp_path_factory.mktemp("chip")  # SoftHSM reads its configuration and its tokens once in a process
    (folder / "tokens").mkdir()
    (folder / "softhsm.conf").write_text(f"directories.tokendir = {folder}/tokens\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm.conf"))
        for label in ("ours", "thief"):
            command = ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", "1234", "--so-pin", "5678"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        (folder / "pin").write_text("1234\n")
        yield ChipSettings(module=SOFTHSM, token="ours", pin_file=folder / "pin")


@pytest.fixture(params=["file", pytest.param("chip", marks=needs_chip)])
def make_store(request: pytest.FixtureRequest) -> MakeStore:
    if request.param == "file":
        return FileKeys
    settings: ChipSettings = request.getfixturevalue("chip")
    return lambda: Pkcs11Keys(settings)


def test_a_key_gets_a_certificate_and_opens_tls_after_a_restart(make_store: MakeStore, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki")
    key = make_store().create()
    issued = authority.issue_device("acme.d1", make_store().request(key))
    store(tmp_path / "device.pem", make_store(), key, issued.certificate_pem)
    certificate = x509.load_pem_x509_certificate((tmp_path / "device.pem").read_bytes())
    assert f"{certificate.serial_number:x}" == issued.serial
    client = ssl.create_default_context(cafile=str(authority.ca_file))
    make_store().load(client, tmp_path / "device.pem")
    assert shake_hands(authority, client) == "acme.d1"


def test_each_key_is_another(make_store: MakeStore) -> None:
    keys = make_store()
    assert len({keys.public_bytes(keys.create()) for _ in range(3)}) == 3


def test_a_certificate_of_another_key_is_refused(make_store: MakeStore, tmp_path: Path) -> None:
    keys = make_store()
    issued = Authority(tmp_path / "pki").issue_device("acme.d1", keys.request(keys.create()))
    with pytest.raises(InvalidInputError, match="another key"):
        store(tmp_path / "device.pem", keys, keys.create(), issued.certificate_pem)
    assert not (tmp_path / "device.pem").exists()


@needs_chip
def test_a_copied_home_is_worth_nothing_without_the_chip(chip: ChipSettings, tmp_path: Path) -> None:
    key = Pkcs11Keys(chip).create()
    assert "BEGIN ENCRYPTED PRIVATE KEY" in key
    with pytest.raises((TypeError, ValueError)):
        FileKeys().request(key)
    with pytest.raises(UnavailableError, match="does not open the key"):
        Pkcs11Keys(ChipSettings(module=chip.module, token="thief", pin_file=chip.pin_file)).request(key)
    (tmp_path / "pin").write_text("0000")
    with pytest.raises(UnavailableError, match="check module and PIN"):
        Pkcs11Keys(ChipSettings(module=chip.module, token=chip.token, pin_file=tmp_path / "pin")).request(key)


def test_the_standard_library_takes_no_key_from_a_chip(tmp_path: Path) -> None:
    """Why the chip guards the key at rest and does not sign handshakes: if this fails one day, it can."""
    authority = Authority(tmp_path / "pki")
    certificate, _ = authority.ensure_client("x")
    with pytest.raises((OSError, ssl.SSLError)):
        ssl.create_default_context().load_cert_chain(certificate, "pkcs11:token=any;object=any")


def shake_hands(authority: Authority, client: ssl.SSLContext) -> str:
    """A TLS handshake in memory; the common name that the server saw."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*authority.ensure_server(["127.0.0.1"]))
    server.load_verify_locations(str(authority.ca_file))
    server.verify_mode = ssl.CERT_REQUIRED
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(sides)
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
    assert not waiting
    subject = (sides[1].getpeercert() or {})["subject"]
    return str(dict(pair[0] for pair in subject)["commonName"])
