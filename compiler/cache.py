"""The build cache: results of stages by the digest of everything that decides them.

A stage's key names its inputs (digests of the model, of earlier results, of calibration data, and the part of recipe
and target that it reads) and the versions of the tools that write it; targets that agree on those share its result.
An entry is a folder with a record beside the result: inputs, tools, what came out, how long it took, and whether a
rebuild gives the same bytes. It appears whole or not at all, so two workers may build the same one: the first keeps
the name. Entries are read-only by convention; those used longest ago go when the cache is full.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compiler.tools import versions_of
from model_registry.manifest import canonical_bytes, sha256
from model_registry.sources import hash_file

DEFAULT_MAX_BYTES = 8 << 30
RECORD = "stage.json"
FORMAT_VERSION = 2  # raise when stages of all kinds change what they write for the same inputs and tools

Reproducibility = Literal["byte-identical", "output-equivalent", "timing"]
"""What a rebuild gives: the same bytes; other bytes that compute the same; other figures, for it measured time."""


@dataclass(frozen=True)
class Stage:
    """A step with all that decides its result. `version` is raised when the step's own code changes its output."""

    name: str
    inputs: Mapping[str, Any]
    tools: Sequence[str]
    build: Callable[[Path], None]
    version: int = 1
    reproducibility: Reproducibility = "byte-identical"

    def key_document(self, versions: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What the key is the digest of; `versions` of tools are those installed unless given."""
        return {
            "stage": self.name,
            "version": [FORMAT_VERSION, self.version],
            "inputs": dict(self.inputs),
            "tools": versions_of(self.tools) if versions is None else {name: versions[name] for name in self.tools},
        }

    def key(self, versions: Mapping[str, str] | None = None) -> str:
        """SHA-256 of the stage's name, inputs and tools (plain data)."""
        return sha256(canonical_bytes(self.key_document(versions)))


@dataclass(frozen=True)
class Built:
    """A stage's result: `digest` names the files' contents, `seconds` is what building them took."""

    name: str
    key: str
    folder: Path
    digest: str
    files: Mapping[str, str]
    seconds: float
    reproducibility: Reproducibility
    was_cached: bool

    def path(self, name: str) -> Path:
        """A file of the result."""
        return self.folder / name

    def read_json(self, name: str) -> Any:
        """A small result."""
        return json.loads(self.path(name).read_bytes())


class BuildCache:
    """Stage results as folders below `root`."""

    def __init__(self, root: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.root = root
        self.max_bytes = max_bytes

    def find(self, stage: Stage) -> Built | None:
        """The result of `stage` if it is there; it then counts as used now."""
        key = stage.key()
        target = self._target(stage, key)
        try:
            record = json.loads((target / RECORD).read_bytes())
            os.utime(target)
        except FileNotFoundError:
            return None
        return _built(target, record, was_cached=True)

    def touch(self, *results: Built) -> None:
        """They count as used now: a long search must not push out what it works from."""
        for built in results:
            os.utime(built.folder)

    def get_or_build(self, stage: Stage) -> Built:
        """The result of `stage`; `stage.build(folder)` fills a new one. What it raises leaves nothing behind."""
        found = self.find(stage)
        if found is not None:
            return found
        target = self._target(stage, stage.key())
        self.root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=self.root, prefix=f".building-{os.getpid()}-"))
        try:
            result = staging / "result"
            result.mkdir()
            started = time.monotonic()
            stage.build(result)
            record = _record(stage, result, time.monotonic() - started)
            (result / RECORD).write_bytes(canonical_bytes(record))
            self._adopt(result, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self.prune(keep=target)
        return _built(target, json.loads((target / RECORD).read_bytes()), was_cached=False)

    def prune(self, keep: Path | None = None) -> None:
        """Remove the entries used longest ago until the rest fits; `keep` stays."""
        entries = [entry for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
        total = 0
        for entry in entries:
            total += sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
            if total > self.max_bytes and entry != keep:
                shutil.rmtree(entry, ignore_errors=True)
        self.sweep()

    def sweep(self) -> None:
        """Remove what builders that died left half done."""
        for staging in self.root.glob(".building-*"):
            if not Path("/proc", staging.name.split("-")[1]).exists():
                shutil.rmtree(staging, ignore_errors=True)

    def _target(self, stage: Stage, key: str) -> Path:
        return self.root / f"{stage.name}-{key[:40]}"

    def _adopt(self, result: Path, target: Path) -> None:
        try:
            os.rename(result, target)
        except OSError:
            if not target.is_dir():  # another worker was first: its result is as good
                raise


def _record(stage: Stage, result: Path, seconds: float) -> dict[str, Any]:
    files = {
        path.relative_to(result).as_posix(): hash_file(path) for path in sorted(result.rglob("*")) if path.is_file()
    }
    return stage.key_document() | {
        "key": stage.key(),
        "files": files,
        "seconds": round(seconds, 3),
        "reproducibility": stage.reproducibility,
    }


def _built(folder: Path, record: Mapping[str, Any], *, was_cached: bool) -> Built:
    return Built(
        name=record["stage"],
        key=record["key"],
        folder=folder,
        digest=sha256(canonical_bytes(record["files"])),
        files=record["files"],
        seconds=record["seconds"],
        reproducibility=record["reproducibility"],
        was_cached=was_cached,
    )
