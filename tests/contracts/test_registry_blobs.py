"""One suite for every blob store: a folder, obstore's memory and local stores, and a server that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import obstore.store
import pytest

from model_registry.blobs import BlobStore, FolderBlobStore, open_blob_store, put_file
from model_registry.manifest import sha256
from model_registry.object_store import SPOOL_BYTES, ObjectBlobStore
from wire.errors import IntegrityError, InvalidInputError, NotFoundError, TooLargeError

ABSENT = "0" * 64


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """A server that speaks S3 on loopback, where moto is installed."""
    server = pytest.importorskip("moto.server", reason="no S3 server: pip install 'moto[s3]' flask flask-cors")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(params=["folder", "memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlobStore]:
    if request.param == "s3":
        address = request.getfixturevalue("s3_address")
        httpx.post(f"{address}/moto-api/reset").raise_for_status()
        httpx.put(f"{address}/fleet").raise_for_status()
        settings = {
            "ENDPOINT_URL": address,
            "ACCESS_KEY_ID": "test",
            "SECRET_ACCESS_KEY": "test",
            "REGION": "us-east-1",
        }
        for name, value in {**settings, "ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield open_blob_store("s3://fleet/blobs")
    elif request.param == "folder":
        yield FolderBlobStore(tmp_path / "blobs")
    elif request.param == "memory":
        yield ObjectBlobStore(obstore.store.MemoryStore(), "fleet/blobs")
    else:
        yield ObjectBlobStore(obstore.store.LocalStore(tmp_path / "objects", mkdir=True))


def test_what_was_put_comes_back(store: BlobStore) -> None:
    digest = store.put(b"weights")
    assert digest == sha256(b"weights")
    assert store.get(digest) == b"weights"
    assert store.has(digest)
    assert store.find_size(digest) == 7


def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    assert store.get(store.put(b"")) == b""
    assert list(store.stream(sha256(b""))) in ([], [b""])


def test_a_stream_is_stored_piece_by_piece_and_its_size_told(store: BlobStore) -> None:
    pieces = [b"ab", b"", b"cde"]
    assert store.put_stream(sha256(b"abcde"), iter(pieces)) == 5
    assert store.get(sha256(b"abcde")) == b"abcde"


def test_putting_the_same_blob_again_changes_nothing(store: BlobStore) -> None:
    digest = store.put(b"once")
    assert store.put(b"once") == digest
    assert store.put_stream(digest, [b"once"]) == 4
    assert list(store.list_digests()) == [digest]


def test_bytes_that_do_not_hash_to_their_name_leave_nothing(store: BlobStore) -> None:
    with pytest.raises(IntegrityError):
        store.put_stream(ABSENT, [b"something else"])
    assert not store.has(ABSENT)
    assert list(store.list_digests()) == []


def test_a_stream_over_its_limit_is_cut_off_and_leaves_nothing(store: BlobStore) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(1000)

    with pytest.raises(TooLargeError):
        store.put_stream(ABSENT, endless(), max_bytes=5000)
    assert list(store.list_digests()) == []


def test_a_stream_that_breaks_leaves_nothing(store: BlobStore) -> None:
    def breaks() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        store.put_stream(sha256(b"half"), breaks())
    assert not store.has(sha256(b"half"))


def test_a_blob_larger_than_the_caller_wants_is_refused(store: BlobStore) -> None:
    with pytest.raises(TooLargeError):
        store.get(store.put(bytes(100)), max_bytes=99)


def test_an_absent_blob_is_not_found(store: BlobStore) -> None:
    with pytest.raises(NotFoundError):
        store.get(ABSENT)
    with pytest.raises(NotFoundError):
        store.stream(ABSENT)
    assert store.find_size(ABSENT) is None
    assert not store.has(ABSENT)
    assert store.delete(ABSENT) is False


@pytest.mark.parametrize(("start", "end"), [(0, None), (0, 10), (3, 3), (3, 10), (200, None), (250, 9999), (256, None)])
def test_a_range_is_those_bytes(store: BlobStore, start: int, end: int | None) -> None:
    data = bytes(range(256))
    assert b"".join(store.stream(store.put(data), start, end)) == data[start:end]


@pytest.mark.parametrize(("start", "end"), [(-1, None), (5, 4), (257, None)])
def test_a_range_outside_of_the_blob_is_refused(store: BlobStore, start: int, end: int | None) -> None:
    with pytest.raises(InvalidInputError):
        store.stream(store.put(bytes(256)), start, end)


def test_a_blob_of_many_pieces_streams_whole(store: BlobStore, tmp_path: Path) -> None:
    data = bytes(range(256)) * (SPOOL_BYTES // 256 + 1)
    (tmp_path / "source").write_bytes(data)
    assert put_file(store, sha256(data), tmp_path / "source") == len(data)
    assert b"".join(store.stream(sha256(data))) == data
    assert b"".join(store.stream(sha256(data), 1_000_000, 3_000_001)) == data[1_000_000:3_000_001]


def test_a_deleted_blob_is_gone(store: BlobStore) -> None:
    digest = store.put(b"old")
    assert store.delete(digest) is True
    assert not store.has(digest)


def test_digests_are_listed_in_order_and_by_prefix(store: BlobStore) -> None:
    digests = sorted(store.put(bytes([n])) for n in range(40))
    assert list(store.list_digests()) == digests
    for prefix in (digests[7][:1], digests[7][:2], digests[7][:5]):
        assert list(store.list_digests(prefix)) == [d for d in digests if d.startswith(prefix)]


@pytest.mark.parametrize("name", ["../../etc/passwd", "A" * 64, "ab", "", "0" * 63 + "\n"])
def test_a_name_that_is_no_digest_never_becomes_a_path(store: BlobStore, name: str) -> None:
    for call in (store.get, store.has, store.find_size, store.delete, store.stream):
        with pytest.raises(InvalidInputError):
            call(name)  # type: ignore[operator]
    with pytest.raises(InvalidInputError):
        store.put_stream(name, [b""])


def test_a_half_written_file_of_a_killed_writer_is_not_listed(tmp_path: Path) -> None:
    store = FolderBlobStore(tmp_path)
    digest = store.put(b"whole")
    (tmp_path / digest[:2] / f".{digest[:16]}.x").write_bytes(b"torn")
    assert list(store.list_digests()) == [digest]
    assert list(store.list_digests(digest[:4])) == [digest]


def test_a_url_names_the_store(tmp_path: Path) -> None:
    for url in (str(tmp_path / "a b"), (tmp_path / "a b").as_uri()):
        digest = open_blob_store(url).put(b"x")
    assert (tmp_path / "a b" / digest[:2] / digest).read_bytes() == b"x"
    assert open_blob_store("memory:///").put(b"x") == digest
    with pytest.raises(InvalidInputError, match="ftp"):
        open_blob_store("ftp://host/blobs")
