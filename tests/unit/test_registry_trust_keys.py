"""Private keys in files, public keys as text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from model_registry.trust.keys import create_key, decode_public_key, load_key
from wire.envelope import key_id
from wire.errors import ConflictError, InvalidInputError, NotFoundError, SignatureError


@pytest.mark.parametrize("text", ["", "not base64!", "AAAA"])
def test_text_that_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        decode_public_key(text)


@pytest.mark.parametrize("passphrase", [None, "open sesame"])
def test_a_created_key_is_private_and_loads_again(tmp_path: Path, passphrase: str | None) -> None:
    path = tmp_path / "keys" / "publisher.pem"
    made = create_key(path, passphrase)
    assert path.stat().st_mode & 0o777 == 0o600
    assert key_id(load_key(path, passphrase).public_key()) == key_id(made.public_key())


def test_a_wrong_passphrase_is_told(tmp_path: Path) -> None:
    create_key(tmp_path / "k.pem", "right")
    for wrong in (None, "wrong"):
        with pytest.raises(InvalidInputError, match="passphrase"):
            load_key(tmp_path / "k.pem", wrong)


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    create_key(tmp_path / "k.pem")
    before = (tmp_path / "k.pem").read_bytes()
    with pytest.raises(ConflictError):
        create_key(tmp_path / "k.pem")
    assert (tmp_path / "k.pem").read_bytes() == before


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    create_key(tmp_path / "k.pem")
    (tmp_path / "k.pem").chmod(0o644)
    with pytest.raises(SignatureError, match="chmod 600"):
        load_key(tmp_path / "k.pem")


def test_a_missing_or_foreign_key_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_key(tmp_path / "none.pem")
    (tmp_path / "text.pem").write_text("hello")
    (tmp_path / "text.pem").chmod(0o600)
    with pytest.raises(InvalidInputError):
        load_key(tmp_path / "text.pem")


def test_a_clouds_key_service_is_not_loaded_with_the_trust_and_stays_importable() -> None:
    code = "import sys, model_registry.trust.keys; print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
