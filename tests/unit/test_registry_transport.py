"""The publish client against a real socket: retries, broken downloads, and what each failure says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from model_registry.client import ControlClient
from model_registry.transport import Transport, error_of
from tests.fakes.registry_server import (
    ControlState,
    client_for,
    running_control,
)
from wire.errors import (
    ConflictError,
    ForeshoreError,
    IntegrityError,
    InvalidInputError,
    NotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
    OverloadedError,
    SignatureError,
    TooLargeError,
    UnavailableError,
)


@pytest.fixture
def state() -> ControlState:
    return ControlState()


@pytest.fixture
def url(state: ControlState) -> Iterator[str]:
    with running_control(state) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[ControlClient]:
    with client_for(url) as client:
        yield client


def test_what_cannot_be_repeated_is_sent_once(client: ControlClient, state: ControlState) -> None:
    state.faults = [("POST publications", 503)]
    with pytest.raises(UnavailableError):
        client.create_publication({})
    assert state.requests == ["POST publications"]


def test_retries_end(client: ControlClient, state: ControlState) -> None:
    state.faults = [("HEAD", 503)] * 50
    with pytest.raises(UnavailableError):
        client.has_blob("0" * 64)
    assert len(state.requests) == 5


def test_a_download_that_breaks_goes_on_where_it_was(
    client: ControlClient, state: ControlState, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 4096
    digest = client.put_blob(data)
    heard: list[int] = []
    assert client.download_blob(digest, tmp_path / "got", max_bytes=1 << 21, on_bytes=heard.append) == len(data)
    assert sum(heard) == len(data)
    assert (tmp_path / "got").read_bytes() == data
    state.blobs[digest] = data[:-1] + b"!"
    with pytest.raises(IntegrityError):
        client.download_blob(digest, tmp_path / "other", max_bytes=1 << 21)
    with pytest.raises(IntegrityError):
        client.download_blob(digest, tmp_path / "other", max_bytes=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got"]


def test_who_hears_of_a_download_can_end_it(client: ControlClient, tmp_path: Path) -> None:
    digest = client.put_blob(b"x" * 1000)

    def end(num_bytes: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        client.download_blob(digest, tmp_path / "got", max_bytes=1000, on_bytes=end)
    assert list(tmp_path.iterdir()) == []


def test_a_blob_with_other_bytes_or_too_many_is_refused(client: ControlClient, state: ControlState) -> None:
    digest = client.put_blob(b"honest")
    assert client.get_blob(digest) == b"honest"
    state.blobs[digest] = b"forged"
    with pytest.raises(IntegrityError):
        client.get_blob(digest)
    with pytest.raises(TooLargeError):
        client.get_blob(digest, max_bytes=3)


def test_nobody_there_is_told_with_the_address() -> None:
    with client_for("http://127.0.0.1:9") as client, pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        client.get("models")


def test_a_wrong_token_is_refused(url: str) -> None:
    with client_for(url, "wrong") as client, pytest.raises(NotAuthenticatedError):
        client.get_publication("p1")


def test_an_address_that_is_not_http_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="ftp"):
        Transport("ftp://host")


def test_an_answer_that_is_not_json_is_told() -> None:
    transport = Transport("http://x", transport=httpx.MockTransport(lambda _: httpx.Response(200, text="<html>")))
    with pytest.raises(UnavailableError, match="JSON"):
        transport.call("GET", "models")
    transport.close()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, b"", NotAuthenticatedError),
        (403, b"{}", NotAllowedError),
        (404, b"[]", NotFoundError),
        (409, b'{"code": "conflict"}', ConflictError),
        (422, b'{"code": "bad_signature", "detail": "d"}', SignatureError),
        (429, b"not json", OverloadedError),
        (501, b'{"code": "missing_extra"}', ForeshoreError),
        (500, b'{"code": "nobody_knows"}', ForeshoreError),
        (418, b"", ForeshoreError),
    ],
)
def test_an_error_comes_back_as_its_type(status: int, body: bytes, kind: type[ForeshoreError]) -> None:
    assert type(error_of(status, body, "http://x")) is kind
