"""An update on a stick: TUF metadata, assignments, releases, manifests and chunks in one folder or one plain tar file.

    metadata/NAME.json   assignments/TENANT.DEVICE   releases/DIGEST   manifests/DIGEST   chunks/DIGEST

A bundle proves nothing by itself: its metadata is one more source for the same client that follows the control plane,
and everything else is asked for by length and digest. Names of any other shape, links and devices are not read; a tar
is never unpacked and never decompressed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

from model_registry.manifest import MAX_MANIFEST_BYTES, MAX_RELEASE_BYTES
from model_registry.trust.client import MAX_TARGETS_BYTES
from model_registry.trust.errors import OversizedError
from model_registry.trust.source import read_limited
from wire.errors import IntegrityError, InvalidInputError, NotFoundError
from wire.frames import MAX_CHUNK_BYTES

MAX_MEMBERS = 2_000_000
MAX_ASSIGNMENT_BYTES = 24 * 1024
_NAME = re.compile(
    r"metadata/[A-Za-z0-9][A-Za-z0-9.-]{0,100}\.json"
    r"|assignments/[a-z0-9][a-z0-9.-]{0,130}"
    r"|(releases|manifests|chunks)/[0-9a-f]{64}"
)


class Shelf(Protocol):
    """Named bytes under a size limit."""

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """The bytes, or None when there are none of this name."""

    def names(self) -> list[str]:
        """All names."""

    def close(self) -> None:
        """Let go of files."""


class FolderShelf:
    """A bundle as a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Read a plain file; links count as absent, also those that lead to a folder."""
        path = self._folder / name
        if not _NAME.fullmatch(name) or path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            return None
        return read_limited(path, max_bytes)

    def names(self) -> list[str]:
        """All names of the right shape."""
        found = (path.relative_to(self._folder).as_posix() for path in sorted(self._folder.glob("*/*")))
        return [name for name in found if _NAME.fullmatch(name)]

    def close(self) -> None:
        """Nothing is open."""


class TarShelf:
    """A bundle as an uncompressed tar file: members are found once, read where they lie."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for count, member in enumerate(tar):
                    if count >= MAX_MEMBERS:
                        raise OversizedError(f"{path.name} has over {MAX_MEMBERS} members", remedy="refused")
                    if member.isreg() and not member.issparse() and _NAME.fullmatch(member.name):
                        self._places[member.name] = (member.offset_data, member.size)
        except (tarfile.TarError, EOFError, ValueError) as error:
            self._file.close()
            raise InvalidInputError(f"{path.name} is no plain tar file: {error}", remedy="make it again") from error
        except OversizedError:
            self._file.close()
            raise

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Read a member."""
        place = self._places.get(name)
        if place is None:
            return None
        if place[1] > max_bytes:
            raise OversizedError(f"{name} has {place[1]} bytes, {max_bytes} at most", remedy="refused")
        return os.pread(self._file.fileno(), place[1], place[0])

    def names(self) -> list[str]:
        """All names of the right shape."""
        return sorted(self._places)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Bundle:
    """What a bundle holds, by kind. It is also a metadata source."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open a folder or a tar file."""
        if path.is_dir():
            return cls(FolderShelf(path))
        if not path.is_file():
            raise NotFoundError(f"{path} is no bundle", remedy="foreshore bundle create")
        return cls(TarShelf(path))

    def close(self) -> None:
        """Let go of files."""
        self._shelf.close()

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """Metadata, for `TrustClient`."""
        return self._shelf.read(f"metadata/{name}", max_bytes)

    def find_assignment(self, device: str) -> bytes | None:
        """The signed assignment of `TENANT.DEVICE`."""
        return self._shelf.read(f"assignments/{device}", MAX_ASSIGNMENT_BYTES)

    def names(self, kind: str) -> list[str]:
        """Full names of everything of one kind."""
        return [name for name in self._shelf.names() if name.startswith(f"{kind}/")]

    def read(self, name: str) -> bytes | None:
        """Any file by its full name, under the limit of its kind; nothing about it is proven."""
        return self._shelf.read(name, _limit(name))

    def find(self, kind: str, digest: str, size_bytes: int) -> bytes | None:
        """Content by digest and exact length; bytes that are not that are an `IntegrityError`."""
        data = self._shelf.read(f"{kind}/{digest}", size_bytes)
        if data is not None and (len(data) != size_bytes or hashlib.sha256(data).hexdigest() != digest):
            raise IntegrityError(f"{kind}/{digest[:12]} in the bundle is not what it is called", remedy="make it again")
        return data


def _limit(name: str) -> int:
    kind = name.partition("/")[0]
    return {"metadata": MAX_TARGETS_BYTES, "manifests": MAX_MANIFEST_BYTES, "chunks": MAX_CHUNK_BYTES}.get(
        kind, MAX_RELEASE_BYTES
    )


def write_bundle(path: Path, files: Iterable[tuple[str, bytes]]) -> int:
    """Write a bundle, a tar file if `path` ends in .tar, else a folder; returns its bytes of content."""
    if path.exists():
        raise InvalidInputError(f"{path} exists", remedy="choose another name")
    written = 0
    if path.suffix != ".tar":
        for name, data in files:
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            written += len(data)
        return written
    with path.open("xb") as file, tarfile.open(fileobj=file, mode="w:") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            written += len(data)
    return written
