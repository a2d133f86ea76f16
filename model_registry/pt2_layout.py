"""A torch.export archive (.pt2), read as a zip file without torch: is it plain data, and which operators does it call?

An archive may hold pickles in three places (weights and constants marked `use_pickle`, script objects, the sample
inputs) and native code (AOTInductor's libraries). Everything but the sample inputs is refused; those are never read:
`write_plain` makes the copy without them that the importer opens. Operators outside PyTorch's own are refused by name.
Sizes (of the file, its list of entries, its graph) are limited before anything is parsed, and entries may not overlap.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wire.errors import UnsupportedModelError

MAX_BYTES = 2 << 30  # an ONNX file in one piece, which it becomes, holds no more
MAX_DIRECTORY_BYTES = 16 << 20
MAX_ENTRIES = 100_000
MAX_GRAPH_BYTES = 256 << 20
NAMESPACES = ("aten", "prims", "higher_order")
_MODEL = "models/model.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_SAMPLES = "data/sample_inputs/model.pt"
_ZIP_START = b"PK\x03\x04"
_END_BYTES = (1 << 16) + 22 + 20
_KNOWN = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|version"
    r"|\.data/[a-z_]+|\.format_version|\.storage_alignment|extra/[\w.]+"
)


@dataclass(frozen=True)
class Pt2Layout:
    """What the archive says: the operators that its graph calls, sorted, and the number of its weights."""

    operators: tuple[str, ...]
    num_weights: int


def is_pt2(path: Path) -> bool:
    """Whether the file is a zip archive that holds an exported program, or says so by its name alone."""
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP_START)) != _ZIP_START:
                return False
        if path.suffix == ".pt2":
            return True  # `read_pt2` says what is wrong with it
        _refuse_large(path)
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == _MODEL for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def read_pt2(path: Path) -> Pt2Layout:
    """Check the archive at `path`. Raises `UnsupportedModelError` with the reason for all that is not plain data."""
    try:
        _refuse_large(path)
        with zipfile.ZipFile(path) as archive:
            names = _names(archive, path)
            weights = _plain_payloads(archive, names, _WEIGHTS)
            _plain_payloads(archive, names, _CONSTANTS)
            operators = tuple(sorted(set(_targets(_json(archive, names, _MODEL)))))
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{path.name} is not a readable torch.export archive: {error}", remedy="write it with torch.export.save"
        ) from error
    foreign = [name for name in operators if not _is_own(name)]
    if foreign:
        raise UnsupportedModelError(
            f"{path.name} calls unknown operators: {', '.join(foreign[:5])}", remedy="express them with PyTorch's own"
        )
    return Pt2Layout(operators, len(weights))


def write_plain(source: Path, out: Path) -> None:
    """Copy the checked archive at `source` to `out` with empty sample inputs, so that no pickle is left in it."""
    read_pt2(source)
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copy:
        for info in archive.infolist():
            if info.filename.endswith(_SAMPLES):
                copy.writestr(info.filename, b"")
            else:
                with archive.open(info) as entry, copy.open(info.filename, "w", force_zip64=True) as target:
                    shutil.copyfileobj(entry, target)


def _refuse_large(path: Path) -> None:
    """Raise `ValueError` unless the file and its list of entries are of a size that may be parsed."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, at most {MAX_BYTES} are read")
    directory_bytes = _directory_bytes(path, size)
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise ValueError(f"its list of entries has {directory_bytes} bytes, at most {MAX_DIRECTORY_BYTES} are read")


def _directory_bytes(path: Path, size: int) -> int:
    """Bytes of the zip's central directory and all behind it, at most: from where the end records say it starts.

    (APPNOTE 4.3.14 to 4.3.16: end record `PK 5 6`, before it the locator `PK 6 7` of the 64-bit record `PK 6 6`.)
    """
    with path.open("rb") as file:
        file.seek(max(0, size - _END_BYTES))
        tail = file.read(_END_BYTES)
        place = tail.rfind(b"PK\x05\x06")
        if place < 0 or place + 22 > len(tail):
            raise ValueError("it has no end record")
        directory_bytes = int.from_bytes(tail[place + 12 : place + 16], "little")
        locator = tail[max(0, place - 20) : place]
        if locator.startswith(b"PK\x06\x07"):
            file.seek(min(size, int.from_bytes(locator[8:16], "little")))
            directory_bytes = max(directory_bytes % 0xFFFFFFFF, int.from_bytes(file.read(56)[40:48], "little"))
    return directory_bytes


def _names(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Entries by their name below the archive's one folder; an entry that is not plain data is refused."""
    found: dict[str, zipfile.ZipInfo] = {}
    infos = archive.infolist()
    if len(infos) > MAX_ENTRIES:
        raise ValueError(f"{len(infos)} entries")
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ValueError("its entries overlap")
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in found or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"entry {info.filename!r} is compressed or there twice")
        if name not in (_MODEL, _WEIGHTS, _CONSTANTS, _SAMPLES) and not _KNOWN.fullmatch(name):
            raise UnsupportedModelError(
                f"{path.name} holds {info.filename!r}, which is not plain data (a pickle or code may be in it)",
                remedy="export plain tensors with torch.export.save, without AOTInductor and script objects",
            )
        found[name] = info
    return found


def _json(archive: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], name: str) -> Any:
    if name not in names:
        raise ValueError(f"there is no {name} in it")
    if names[name].file_size > MAX_GRAPH_BYTES:
        raise ValueError(f"{name} has {names[name].file_size} bytes")
    return json.loads(archive.read(names[name]))


def _plain_payloads(archive: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], name: str) -> dict[str, Any]:
    """The entries of a weights or constants list, all of them tensors stored as they are."""
    config = _json(archive, names, name).get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{name} lists nothing")
    for tensor, payload in config.items():
        place = f"{name.rpartition('/')[0]}/{payload['path_name']}"
        if payload.get("use_pickle") is not False or not payload.get("tensor_meta") or not _KNOWN.fullmatch(place):
            raise UnsupportedModelError(
                f"{tensor!r} is stored as a pickle, and opening one can run code",
                remedy="make it a plain, contiguous tensor before torch.export",
            )
        if place not in names:
            raise ValueError(f"{place} is missing")
    return config


def _targets(value: Any) -> Iterator[str]:
    """The targets of all nodes, those of nested graphs included."""
    if isinstance(value, dict):
        if isinstance(value.get("target"), str) and "inputs" in value:
            yield value["target"]
        for inner in value.values():
            yield from _targets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _targets(inner)


def _is_own(target: str) -> bool:
    parts = target.split(".")
    if parts[:2] == ["torch", "ops"]:
        return len(parts) >= 4 and parts[2] in NAMESPACES
    return parts[0] in ("_operator", "math") and len(parts) == 2
