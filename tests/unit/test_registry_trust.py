"""Keys in files, and who may sign a release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from model_registry.manifest import Release, ReleaseArtefact
from model_registry.trust import (
    KeyRing,
    create_key,
    encode_public_key,
    key_ring,
    load_key,
    sign_release,
    verify_release,
)
from wire.envelope import key_id, parse_envelope, sign
from wire.errors import ConflictError, IntegrityError, InvalidInputError, NotFoundError, SignatureError
from wire.messages import DESIRED_TYPE, RELEASE_TYPE


def release(version: str = "1.0.0") -> Release:
    artefact = ReleaseArtefact(
        target="cpu-x86", manifest="a" * 64, manifest_bytes=10, size_bytes=20, runtime="onnxruntime", precision="int8"
    )
    return Release(
        tenant="demo",
        name="vision",
        version=version,
        sequence=1,
        kind="tensor",
        source_format="onnx",
        source_digest="b" * 64,
        created_at="2026-01-01T00:00:00Z",
        artefacts=[artefact],
    )


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def ring(*keys: Ed25519PrivateKey, threshold: int = 1) -> KeyRing:
    return key_ring([encode_public_key(key.public_key()) for key in keys], threshold=threshold)


def test_a_release_signed_by_a_trusted_key_is_read_back(key: Ed25519PrivateKey) -> None:
    assert ring(key).verify_release(sign_release(release(), key)) == release()


def test_a_release_signed_by_a_stranger_is_refused(key: Ed25519PrivateKey) -> None:
    with pytest.raises(SignatureError):
        ring(Ed25519PrivateKey.generate()).verify_release(sign_release(release(), key))


def test_an_empty_ring_trusts_nobody(key: Ed25519PrivateKey) -> None:
    with pytest.raises(SignatureError):
        ring().verify_release(sign_release(release(), key))


def test_a_changed_release_is_refused(key: Ed25519PrivateKey) -> None:
    signature = parse_envelope(sign_release(release(), key)).signatures[0]
    other = parse_envelope(sign_release(release("6.6.6"), Ed25519PrivateKey.generate())).with_signature(signature)
    with pytest.raises(SignatureError):
        ring(key).verify_release(other.to_bytes())


def test_a_signature_over_another_kind_of_document_does_not_count(key: Ed25519PrivateKey) -> None:
    with pytest.raises(SignatureError):
        ring(key).verify_release(sign(DESIRED_TYPE, release().to_bytes(), key).to_bytes())


def test_two_signatures_of_one_key_are_one(key: Ed25519PrivateKey) -> None:
    other = Ed25519PrivateKey.generate()
    envelope = parse_envelope(sign_release(release(), key))
    both = ring(key, other, threshold=2)
    document = json.loads(envelope.to_bytes())
    document["signatures"] *= 2
    with pytest.raises(SignatureError):
        both.verify_release(json.dumps(document).encode())
    second = parse_envelope(sign_release(release(), other)).signatures[0]
    assert both.verify_release(envelope.with_signature(second).to_bytes()) == release()


def test_a_release_in_another_byte_form_is_refused_even_when_signed(key: Ed25519PrivateKey) -> None:
    padded = release().to_bytes().replace(b",", b", ", 1)
    with pytest.raises(IntegrityError):
        ring(key).verify_release(sign(RELEASE_TYPE, padded, key).to_bytes())


def test_the_release_must_be_the_one_that_was_asked_for(key: Ed25519PrivateKey) -> None:
    envelope = sign_release(release(), key)
    assert verify_release(envelope, ring(key), expected_digest=release().digest) == release()
    with pytest.raises(IntegrityError):
        verify_release(envelope, ring(key), expected_digest="c" * 64)


def test_a_ring_survives_its_trip_as_text(key: Ed25519PrivateKey) -> None:
    names = ring(key).to_dict()
    assert set(names) == {key_id(key.public_key())}
    assert set(key_ring(names)) == set(names)


def test_a_key_under_a_false_id_is_refused(key: Ed25519PrivateKey) -> None:
    with pytest.raises(InvalidInputError):
        key_ring({"f" * 64: encode_public_key(key.public_key())})


@pytest.mark.parametrize("text", ["", "not base64!", "AAAA"])
def test_text_that_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        key_ring([text])


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
