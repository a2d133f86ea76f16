"""Blobs in an object store (S3-compatible, Google, Azure) through obstore; the twin of `FolderBlobStore`.

An object store cannot rename, so a stream is spooled and verified here first and only then uploaded: a wrong blob never
gets a name. Keys are `PREFIX/sha256/ab/DIGEST`. Credentials come from the store's usual environment variables.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from model_registry.blobs import (
    MAX_BLOB_BYTES,
    PIECE_BYTES,
    check_digest,
    check_range,
    check_size,
    copy_verified,
    missing,
)
from model_registry.manifest import sha256
from wire.errors import MissingExtraError, UnavailableError

SPOOL_BYTES = 8 << 20
_BATCH = 1000


class ObjectBlobStore:
    """Blobs in the obstore `store` (its MemoryStore, LocalStore, S3Store, ...), below `prefix`."""

    def __init__(self, store: Any, prefix: str = "") -> None:
        self._obstore = _load_obstore()
        self._store = store
        self._prefix = f"{prefix.strip('/')}/sha256" if prefix.strip("/") else "sha256"

    def put(self, data: bytes) -> str:
        """See `BlobStore`."""
        digest = sha256(data)
        if not self.has(digest):
            self._call("put", self._key(digest), data)
        return digest

    def put_stream(self, digest: str, pieces: Iterable[bytes], *, max_bytes: int = MAX_BLOB_BYTES) -> int:
        """See `BlobStore`; above 8 MiB the spool is a temporary file."""
        key = self._key(digest)
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            size = copy_verified(digest, pieces, spool.write, max_bytes)
            spool.seek(0)
            self._call("put", key, spool if size > SPOOL_BYTES else spool.read())
        return size

    def get(self, digest: str, *, max_bytes: int = MAX_BLOB_BYTES) -> bytes:
        """See `BlobStore`."""
        key = self._key(digest)
        try:
            result = self._call("get", key)
        except FileNotFoundError as error:
            raise missing(digest) from error
        check_size(digest, result.meta["size"], max_bytes)
        return bytes(result.bytes())

    def stream(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See `BlobStore`."""
        size = self.find_size(digest)
        if size is None:
            raise missing(digest)
        return self._pieces(digest, *check_range(start, end, size))

    def has(self, digest: str) -> bool:
        """See `BlobStore`."""
        return self.find_size(digest) is not None

    def find_size(self, digest: str) -> int | None:
        """See `BlobStore`."""
        try:
            return int(self._call("head", self._key(digest))["size"])
        except FileNotFoundError:
            return None

    def delete(self, digest: str) -> bool:
        """See `BlobStore`."""
        if not self.has(digest):
            return False
        self._call("delete", self._key(digest))
        return True

    def list_digests(self, prefix: str = "") -> Iterator[str]:
        """See `BlobStore`."""
        folder = f"{self._prefix}/{prefix[:2]}" if len(prefix) >= 2 else self._prefix
        pages = self._call("list", folder, chunk_size=_BATCH)
        names = (str(item["path"]).rsplit("/", 1)[-1] for page in pages for item in page)
        return iter(sorted(name for name in names if name.startswith(prefix)))

    def _key(self, digest: str) -> str:
        return f"{self._prefix}/{check_digest(digest)[:2]}/{digest}"

    def _pieces(self, digest: str, start: int, end: int) -> Iterator[bytes]:
        for offset in range(start, end, PIECE_BYTES):
            try:
                piece = self._call("get_range", self._key(digest), start=offset, end=min(end, offset + PIECE_BYTES))
            except FileNotFoundError as error:
                raise missing(digest) from error
            yield bytes(piece)

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(self._obstore, name)(self._store, *arguments, **options)
        except FileNotFoundError:
            raise
        except self._obstore.exceptions.NotFoundError as error:
            raise FileNotFoundError(str(error)) from error
        except (OSError, self._obstore.exceptions.BaseError) as error:
            raise UnavailableError(f"object store: {error}", remedy="check its address and credentials") from error


def open_object_store(url: str) -> ObjectBlobStore:
    """The store at s3://BUCKET/PREFIX, gs://, az:// (or memory:///, for tests), configured by the environment.

    For a server of your own set `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, and
    `AWS_ALLOW_HTTP=true` where it has no TLS.
    """
    _load_obstore()
    stores = importlib.import_module("obstore.store")
    return ObjectBlobStore(stores.from_url(url))


def _load_obstore() -> Any:
    try:
        importlib.import_module("obstore.exceptions")
        return importlib.import_module("obstore")
    except ImportError as error:
        raise MissingExtraError("obstore", "control") from error
