"""Artefacts on disk: partial ones that grow chunk by chunk, whole ones by manifest digest, `current` links by name.

    store/partial/{manifest}/files/...   preallocated files; `done` holds a record per chunk that is in place
    store/artefacts/{manifest}/          manifest.json and files/, complete, renamed into place when every digest held
    store/current/{name}                 symbolic link to the artefact that is committed, replaced atomically
    store/trash/                         what is being deleted: moved here first, so nothing is ever half there

Disk for a whole artefact is taken before its first chunk is asked for, so nobody else can take it in between. A chunk
is written before its record; on opening, every recorded chunk is hashed again, so a torn write is a missing chunk and
nothing worse. Only whole artefacts run, and only re-hashed chunks serve as bases of deltas.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_registry.manifest import Chunk, Manifest, parse_manifest, sha256
from wire.errors import InsufficientSpaceError, IntegrityError, NotFoundError
from wire.process import replace_durably

_RECORD = struct.Struct(">I")
_COLLECTED = ("partial", "artefacts", "manifests")
_BLOCK_BYTES = 4096
RESERVE_BYTES = 16 << 20
"""Disk that always stays free."""


@dataclass(frozen=True)
class Place:
    """Where a chunk lies inside an artefact."""

    path: str
    offset: int
    chunk: Chunk


def places(manifest: Manifest) -> list[Place]:
    """One place per chunk, by index."""
    found = []
    for file in manifest.files:
        offset = 0
        for chunk in file.chunks:
            found.append(Place(file.path, offset, chunk))
            offset += chunk.size_bytes
    return found


class Partial:
    """An artefact that is being fetched. One writer."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.places = places(manifest)
        self._folder = folder
        self._files = folder / "files"
        self._log = folder / "done"
        self._allocate()
        self.done = self._trusted()

    def missing(self) -> list[int]:
        """Indexes of the chunks that are not in place."""
        return [index for index in range(len(self.places)) if index not in self.done]

    @property
    def bytes_done(self) -> int:
        """Bytes in place."""
        return sum(self.places[index].chunk.size_bytes for index in self.done)

    def put(self, index: int, data: bytes) -> None:
        """Put a verified chunk in its place; durable when this returns."""
        self.put_all([(index, data)])

    def put_all(self, chunks: Sequence[tuple[int, bytes]]) -> None:
        """Put verified chunks in their places with one sync per file; durable when this returns."""
        by_path: dict[str, list[tuple[int, bytes]]] = {}
        for index, data in chunks:
            by_path.setdefault(self.places[index].path, []).append((self.places[index].offset, data))
        for path, parts in by_path.items():
            with (self._files / path).open("r+b") as file:
                for offset, data in parts:
                    file.seek(offset)
                    file.write(data)
                file.flush()
                os.fdatasync(file.fileno())
        with self._log.open("ab") as log:
            log.write(b"".join(_RECORD.pack(index) for index, _ in chunks))
            log.flush()
            os.fdatasync(log.fileno())
        self.done.update(index for index, _ in chunks)

    def _allocate(self) -> None:
        """Take the disk for every file, or raise `InsufficientSpaceError`; names and sizes are durable after it."""
        folders = {self._folder, self._files}
        for entry in self.manifest.files:
            path = self._files / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            folders.update(parent for parent in path.parents if parent.is_relative_to(self._files))
            with path.open("ab") as file, told_as_space(entry.size_bytes, path):
                file.truncate(entry.size_bytes)
                if entry.size_bytes:
                    os.posix_fallocate(file.fileno(), 0, entry.size_bytes)
        for folder in folders:
            _sync(folder)

    def _trusted(self) -> set[int]:
        """Recorded chunks whose bytes hash right; the log is rewritten to say just that."""
        data = self._log.read_bytes() if self._log.exists() else b""
        whole = data[: len(data) - len(data) % _RECORD.size]
        recorded = {index for (index,) in _RECORD.iter_unpack(whole) if index < len(self.places)}
        good = {index for index in recorded if self._holds(self.places[index])}
        if good != recorded or len(whole) != len(data):
            replace_durably(self._log, b"".join(_RECORD.pack(index) for index in sorted(good)))
        return good

    def _holds(self, place: Place) -> bool:
        return sha256(_slice(self._files / place.path, place.offset, place.chunk.size_bytes)) == place.chunk.digest


class Store:
    """All artefacts of a device below one folder."""

    def __init__(self, folder: Path, disk_budget_bytes: int) -> None:
        self._folder = folder
        self._budget_bytes = disk_budget_bytes
        for part in (*_COLLECTED, "current", "trash"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def files(self, manifest: str) -> Path:
        """Folder of the files of a whole artefact."""
        return self._folder / "artefacts" / manifest / "files"

    def has(self, manifest: str) -> bool:
        """Whether the artefact is whole."""
        return (self._folder / "artefacts" / manifest / "manifest.json").exists()

    def manifest_file(self, digest: str) -> Path:
        """Where the bytes of a manifest lie."""
        return self._folder / "manifests" / digest

    def put_manifest(self, digest: str, data: bytes) -> None:
        """Keep the bytes of a verified manifest."""
        replace_durably(self.manifest_file(digest), data)

    def find_manifest(self, digest: str) -> Manifest | None:
        """The manifest, if its bytes are here and hash right."""
        for path in (self.manifest_file(digest), self._folder / "artefacts" / digest / "manifest.json"):
            with contextlib.suppress(FileNotFoundError, IntegrityError):
                return parse_manifest(path.read_bytes(), expected_digest=digest)
        return None

    def get_manifest(self, digest: str) -> Manifest:
        """The manifest; `NotFoundError` when it is not here."""
        manifest = self.find_manifest(digest)
        if manifest is None:
            raise NotFoundError(f"manifest {digest[:12]} is not on this device", remedy="it will be fetched again")
        return manifest

    def held(self) -> list[str]:
        """Digests of all whole artefacts."""
        return sorted(path.name for path in (self._folder / "artefacts").iterdir() if self.has(path.name))

    def preflight(self, manifest: Manifest) -> None:
        """Raise `InsufficientSpaceError` unless what is missing fits, with a reserve."""
        if self.has(manifest.digest):
            return
        present = _used_bytes(self._folder / "partial" / manifest.digest)
        wanted = max(manifest.requires.disk_bytes, sum(_on_disk(file.size_bytes) for file in manifest.files))
        needed = max(0, wanted - present) + RESERVE_BYTES
        free = max(0, min(shutil.disk_usage(self._folder).free, self._budget_bytes - _used_bytes(self._folder)))
        if needed > free:
            raise _no_space(needed, free)

    def open_partial(self, manifest: Manifest) -> Partial:
        """The growing artefact, as far as it is there."""
        return Partial(self._folder / "partial" / manifest.digest, manifest)

    def find_chunks(self, bases: list[str]) -> ChunkIndex:
        """Chunks of whole artefacts, by digest."""
        return ChunkIndex({digest: (self.get_manifest(digest), self.files(digest)) for digest in bases})

    def complete(self, manifest: Manifest) -> None:
        """Hash every file and move the artefact among the whole ones; a wrong file raises `IntegrityError`."""
        digest = manifest.digest
        final, growing = self._folder / "artefacts" / digest, self._folder / "partial" / digest
        folder = final if self.has(digest) else growing
        for entry in manifest.files:
            path = folder / "files" / entry.path
            if not path.is_file() or path.stat().st_size != entry.size_bytes or _hash(path) != entry.digest:
                self._discard(folder)
                raise IntegrityError(f"{entry.path} is not what was signed", remedy="it will be fetched again")
        if folder is final:
            return
        (growing / "done").unlink(missing_ok=True)
        replace_durably(growing / "manifest.json", manifest.to_bytes())
        if final.exists():
            self._discard(final)
        os.rename(growing, final)
        _sync(final.parent)

    def point(self, name: str, manifest: str | None) -> None:
        """Make `current/{name}` say what is committed, atomically."""
        link = self._folder / "current" / name
        if manifest is None:
            link.unlink(missing_ok=True)
            return
        wanted = f"../artefacts/{manifest}"
        if link.is_symlink() and os.readlink(link) == wanted:
            return
        temporary = link.with_name(f".{name}.new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(wanted)
        os.replace(temporary, link)
        _sync(link.parent)

    def collect(self, keep: set[str]) -> int:
        """Delete all that `keep` does not name; returns how many things went. `OSError`: the rest stays for now."""
        gone = [path for part in _COLLECTED for path in (self._folder / part).iterdir() if path.name not in keep]
        for path in gone:
            self._to_trash(path)
        for path in (self._folder / "trash").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return len(gone)

    def _discard(self, folder: Path) -> None:
        shutil.rmtree(self._to_trash(folder), ignore_errors=True)

    def _to_trash(self, path: Path) -> Path:
        gone = self._folder / "trash" / f"{path.parent.name}-{path.name}-{uuid.uuid4().hex[:8]}"
        os.rename(path, gone)
        return gone


class ChunkIndex:
    """Finds chunks inside whole artefacts; what it returns has been hashed again."""

    def __init__(self, bases: dict[str, tuple[Manifest, Path]]) -> None:
        self._where = {
            place.chunk.digest: (folder / place.path, place.offset, place.chunk.size_bytes)
            for manifest, folder in bases.values()
            for place in places(manifest)
        }

    def find(self, digest: str) -> bytes | None:
        """The chunk, or None when it is absent or damaged."""
        where = self._where.get(digest)
        if where is None or not where[0].exists():
            return None
        data = _slice(*where)
        return data if sha256(data) == digest else None


def _slice(path: Path, offset: int, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size_bytes)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _used_bytes(folder: Path) -> int:
    """Disk below `folder`; what vanishes meanwhile counts for nothing."""
    used = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            used += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return used


def _on_disk(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _no_space(needed_bytes: int, free_bytes: int) -> InsufficientSpaceError:
    return InsufficientSpaceError(
        f"the model needs {needed_bytes} bytes of disk and {free_bytes} are free",
        remedy="free disk or raise disk_budget_bytes",
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
    )


@contextlib.contextmanager
def told_as_space(needed_bytes: int, path: Path) -> Iterator[None]:
    """Turn the system's "no space" and "quota exceeded" into `InsufficientSpaceError` with both numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise _no_space(needed_bytes, shutil.disk_usage(path.parent).free) from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
