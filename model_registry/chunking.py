"""Artefact files as chunks whose borders are tensors' borders, so that one changed tensor changes only its own chunks.

Rules, in order: a tensor of 64 KiB or more starts a chunk and is cut at multiples of the chunk size; smaller
neighbours share a chunk until it has 64 KiB; what is left of a large tensor may take small neighbours in. Formats
whose tensors are known: safetensors, GGUF, ONNX with the data inside or beside it; every other file is cut at fixed
offsets. The same bytes always give the same chunks. Files are read once, front to back, a chunk at a time.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, cast

from model_registry.gguf_layout import read_gguf
from model_registry.layout import Span
from model_registry.manifest import ArtefactFile, Chunk, sha256
from model_registry.onnx_layout import read_onnx
from model_registry.safetensors_layout import read_safetensors
from wire.errors import IntegrityError, InvalidInputError, UnsupportedModelError
from wire.frames import MAX_CHUNK_BYTES

MIN_CHUNK_BYTES = 64 * 1024
CRUMB_BYTES = 4 * 1024  # neighbours below this always join an open chunk that has room

Progress = Callable[[int], None]
"""Called with the number of bytes read since the last call."""


def describe_folder(
    folder: Path, *, chunk_bytes: int = MAX_CHUNK_BYTES, progress: Progress | None = None
) -> list[ArtefactFile]:
    """Describe every file below `folder`, sorted by path. Links and special files are refused.

    `chunk_bytes` is 64 to 256 KiB: the smaller for brokers that limit payloads to 128 KiB.
    """
    _check_chunk_bytes(chunk_bytes)
    paths = sorted(_files_below(folder), key=lambda path: path.relative_to(folder).as_posix())
    spans_by_path = _external_spans(paths)
    return [
        describe_file(
            path,
            path.relative_to(folder).as_posix(),
            chunk_bytes=chunk_bytes,
            spans=spans_by_path.get(path),
            progress=progress,
        )
        for path in paths
    ]


def describe_file(
    path: Path,
    name: str,
    *,
    chunk_bytes: int = MAX_CHUNK_BYTES,
    spans: Iterable[Span] | None = None,
    progress: Progress | None = None,
) -> ArtefactFile:
    """Describe one file as `name`; `spans` are its tensors where another file knows them."""
    _check_chunk_bytes(chunk_bytes)
    size = path.stat().st_size
    regions = cover(find_spans(path) if spans is None else spans, size)
    hasher, chunks = hashlib.sha256(), []
    with path.open("rb") as file:
        for region in cut(regions, chunk_bytes):
            data = file.read(region.size_bytes)
            if len(data) != region.size_bytes:
                raise IntegrityError(f"{name} became shorter while it was read", remedy="do not change it meanwhile")
            hasher.update(data)
            width = cast(Literal[1, 2, 4], region.element_bytes)
            chunks.append(Chunk(digest=sha256(data), size_bytes=len(data), element_bytes=width))
            if progress is not None:
                progress(len(data))
        if file.read(1):
            raise IntegrityError(f"{name} became longer while it was read", remedy="do not change it meanwhile")
    return ArtefactFile(path=name, size_bytes=size, digest=hasher.hexdigest(), chunks=chunks)


def iter_chunks(path: Path, file: ArtefactFile) -> Iterator[bytes]:
    """The bytes of each chunk of `file` in order, verified: `path` must still hold what was described."""
    with path.open("rb") as stream:
        for index, chunk in enumerate(file.chunks):
            data = stream.read(chunk.size_bytes)
            if sha256(data) != chunk.digest:
                raise IntegrityError(f"{file.path}: chunk {index} changed since it was described", remedy="start again")
            yield data


def find_spans(path: Path) -> list[Span]:
    """The tensors inside a file of a known format; none for other files and for ones that are damaged."""
    try:
        match path.suffix:
            case ".safetensors":
                return list(read_safetensors(path).spans)
            case ".gguf":
                return list(read_gguf(path).spans)
            case ".onnx":
                return read_onnx(path).spans
    except UnsupportedModelError:
        return []
    return []


def cover(spans: Iterable[Span], size_bytes: int) -> Iterator[Span]:
    """Every byte of the file exactly once: the tensors, and what lies between them. Overlaps lose to the first."""
    end = 0
    for span in sorted(spans):
        stop = span.offset + span.size_bytes
        if span.offset < end or stop > size_bytes or span.size_bytes == 0:
            continue
        if span.offset > end:
            yield Span(end, span.offset - end, 1)
        yield span
        end = stop
    if end < size_bytes:
        yield Span(end, size_bytes - end, 1)


def cut(regions: Iterable[Span], chunk_bytes: int) -> Iterator[Span]:
    """The chunks of adjoining regions, as spans."""
    pack: list[Span] = []
    for region in regions:
        if region.size_bytes < MIN_CHUNK_BYTES:
            if pack and _is_full(pack, region, chunk_bytes):
                yield _merge(pack)
                pack = []
            pack.append(region)
            continue
        if pack:
            yield _merge(pack)
        pieces = _pieces(region, chunk_bytes)
        yield from pieces[:-1]
        pack = pieces[-1:]
    if pack:
        yield _merge(pack)


def _is_full(pack: list[Span], region: Span, chunk_bytes: int) -> bool:
    size = sum(part.size_bytes for part in pack)
    enough = size >= MIN_CHUNK_BYTES and region.size_bytes >= CRUMB_BYTES
    return enough or size + region.size_bytes > chunk_bytes


def _merge(pack: list[Span]) -> Span:
    bytes_by_width: dict[int, int] = defaultdict(int)
    for part in pack:
        bytes_by_width[part.element_bytes] += part.size_bytes
    width = max(sorted(bytes_by_width), key=bytes_by_width.__getitem__)
    return Span(pack[0].offset, sum(part.size_bytes for part in pack), width)


def _pieces(region: Span, chunk_bytes: int) -> list[Span]:
    end = region.offset + region.size_bytes
    return [
        Span(offset, min(chunk_bytes, end - offset), region.element_bytes)
        for offset in range(region.offset, end, chunk_bytes)
    ]


def _external_spans(paths: list[Path]) -> dict[Path, list[Span]]:
    found: dict[Path, list[Span]] = defaultdict(list)
    for path in paths:
        if path.suffix != ".onnx":
            continue
        try:
            layout = read_onnx(path)
        except UnsupportedModelError:
            continue
        for span in layout.external:
            if span.size_bytes is not None:
                target = path.parent / span.location
                found[target].append(Span(span.offset, span.size_bytes, span.element_bytes, span.name))
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is not a folder", remedy="give the artefact's folder")
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InvalidInputError(f"{path} is a link or a special file", remedy="copy its content into the folder")
        if path.is_file():
            yield path


def _check_chunk_bytes(chunk_bytes: int) -> None:
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes % 4:
        raise InvalidInputError(
            f"chunk size {chunk_bytes} is not possible", remedy=f"{MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes"
        )
