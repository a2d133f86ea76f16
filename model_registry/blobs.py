"""Content-addressed bytes: a small Protocol and its folder. A blob's name is the SHA-256 of its content.

A blob is whole and verified before anybody can see it, and never changes. Putting one that is there already costs a
look. Chunks, manifests, delta frames and source files are all blobs. The object-store twin is in `object_store`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from model_registry.manifest import sha256
from wire.errors import InsufficientSpaceError, IntegrityError, InvalidInputError, NotFoundError, TooLargeError

MAX_BLOB_BYTES = 1 << 40
PIECE_BYTES = 1 << 20

_DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobStore(Protocol):
    """What callers need of a place for blobs. Every method may be called from several threads and processes."""

    def put(self, data: bytes) -> str:
        """Store `data`, return its digest."""

    def put_stream(self, digest: str, pieces: Iterable[bytes], *, max_bytes: int = MAX_BLOB_BYTES) -> int:
        """Store what `pieces` add up to if it hashes to `digest`; return its size.

        Raises `IntegrityError` or `TooLargeError` and keeps nothing then.
        """

    def get(self, digest: str, *, max_bytes: int = MAX_BLOB_BYTES) -> bytes:
        """The whole blob. Raises `NotFoundError`, `TooLargeError`."""

    def stream(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes `start` up to `end` (exclusive, None: the blob's end) in pieces. Raises `NotFoundError` at once."""

    def has(self, digest: str) -> bool:
        """Whether the blob is here."""

    def find_size(self, digest: str) -> int | None:
        """The blob's size, or None when it is not here."""

    def delete(self, digest: str) -> bool:
        """Remove the blob; False when it was not here."""

    def list_digests(self, prefix: str = "") -> Iterator[str]:
        """Digests that start with `prefix`, sorted."""


class FolderBlobStore:
    """Blobs as files below one folder, two hex digits per level; writes survive a power cut whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, data: bytes) -> str:
        """Store `data`, return its digest."""
        digest = sha256(data)
        if not self.has(digest):
            self._write(digest, [data], len(data))
        return digest

    def put_stream(self, digest: str, pieces: Iterable[bytes], *, max_bytes: int = MAX_BLOB_BYTES) -> int:
        """See `BlobStore`. The stream is read and verified even when the blob is here already."""
        return self._write(check_digest(digest), pieces, max_bytes)

    def get(self, digest: str, *, max_bytes: int = MAX_BLOB_BYTES) -> bytes:
        """See `BlobStore`."""
        try:
            with self._path(digest).open("rb") as file:
                check_size(digest, os.fstat(file.fileno()).st_size, max_bytes)
                return file.read()
        except FileNotFoundError as error:
            raise missing(digest) from error

    def stream(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See `BlobStore`."""
        size = self.find_size(digest)
        if size is None:
            raise missing(digest)
        return self._pieces(self._path(digest), *check_range(start, end, size))

    def has(self, digest: str) -> bool:
        """See `BlobStore`."""
        return self.find_size(digest) is not None

    def find_size(self, digest: str) -> int | None:
        """See `BlobStore`."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def delete(self, digest: str) -> bool:
        """See `BlobStore`."""
        try:
            self._path(digest).unlink()
        except FileNotFoundError:
            return False
        return True

    def list_digests(self, prefix: str = "") -> Iterator[str]:
        """See `BlobStore`."""
        pattern = f"{prefix[:2]}*/*" if len(prefix) < 2 else f"{prefix[:2]}/{prefix}*"
        names = (path.name for path in self.root.glob(pattern))
        return iter(sorted(name for name in names if name.startswith(prefix) and _DIGEST.fullmatch(name)))

    def _path(self, digest: str) -> Path:
        return self.root / check_digest(digest)[:2] / digest

    def _write(self, digest: str, pieces: Iterable[bytes], max_bytes: int) -> int:
        path = self._path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{digest[:16]}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                size = copy_verified(digest, pieces, file.write, max_bytes)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            Path(temporary).unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise InsufficientSpaceError(f"no space left for blob {digest[:12]}", remedy="free the disk") from error
            raise
        _sync_folder(path.parent)
        return size

    @staticmethod
    def _pieces(path: Path, start: int, end: int) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            left = end - start
            while left > 0 and (piece := file.read(min(PIECE_BYTES, left))):
                left -= len(piece)
                yield piece


def open_blob_store(url: str) -> BlobStore:
    """The store that `url` names: a folder (a path or file://), or s3://, gs://, az:// (extra `control`)."""
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return FolderBlobStore(Path(unquote(parts.path) if parts.scheme else url))
    if parts.scheme in ("s3", "s3a", "gs", "az", "azure", "abfs", "memory"):
        from model_registry.object_store import open_object_store

        return open_object_store(url)
    raise InvalidInputError(f"blob store {url!r} is unknown", remedy="a folder, or s3://BUCKET/PREFIX, gs://, az://")


def put_file(store: BlobStore, digest: str, path: Path) -> int:
    """Store the file at `path`, which must hash to `digest`, without holding it in memory; return its size."""
    return store.put_stream(digest, file_pieces(path))


def file_pieces(path: Path) -> Iterator[bytes]:
    """The file's bytes, a megabyte at a time."""
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def check_digest(digest: str) -> str:
    """Return `digest` if it is a SHA-256 in lower-case hex; anything else must never become a path or a key."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidInputError(f"digest {digest[:80]!r} is not a SHA-256 in lower-case hex", remedy="64 hex digits")
    return digest


def check_size(digest: str, size: int, max_bytes: int) -> None:
    """Raise `TooLargeError` when a blob is larger than the caller wants to hold."""
    if size > max_bytes:
        raise TooLargeError(f"blob {digest[:12]} has {size} bytes", remedy=f"at most {max_bytes} are accepted here")


def check_range(start: int, end: int | None, size: int) -> tuple[int, int]:
    """The range as two offsets inside a blob of `size` bytes; an end past the blob is cut, a start past it refused."""
    stop = size if end is None else min(end, size)
    if start < 0 or start > size or (end is not None and end < start):
        raise InvalidInputError(f"range {start}-{end} is outside of {size} bytes", remedy="ask for bytes that exist")
    return start, stop


def copy_verified(digest: str, pieces: Iterable[bytes], write: Callable[[bytes], object], max_bytes: int) -> int:
    """Hand each piece to `write`; raise unless they hash to `digest` and stay within `max_bytes`. Returns the size."""
    hasher, size = hashlib.sha256(), 0
    for piece in pieces:
        size += len(piece)
        check_size(digest, size, max_bytes)
        hasher.update(piece)
        write(piece)
    if hasher.hexdigest() != digest:
        raise IntegrityError(f"bytes do not hash to {digest[:12]}", remedy="send the blob again", size_bytes=size)
    return size


def missing(digest: str) -> NotFoundError:
    """The error for a blob that is not in the store."""
    return NotFoundError(f"blob {digest[:12]} is not stored", remedy="upload it first", digest=digest)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
