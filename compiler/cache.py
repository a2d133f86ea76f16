"""The build cache: results of stages by the digest of everything that decides them.

A stage's key names its inputs (digests of source, filled recipe and calibration data) and the versions of the tools
that write it; targets that agree on those share its result. An entry appears whole or not at all, so two workers may
build the same one: the first keeps the name. Entries are read-only by convention; the oldest go when the cache is full.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_registry.manifest import canonical_bytes, sha256

DEFAULT_MAX_BYTES = 8 << 30


@dataclass(frozen=True)
class Built:
    """A stage's result and whether it was there before."""

    folder: Path
    was_cached: bool


class BuildCache:
    """Stage results as folders below `root`."""

    def __init__(self, root: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.root = root
        self.max_bytes = max_bytes

    def get_or_build(self, stage: str, inputs: Mapping[str, Any], build: Callable[[Path], None]) -> Built:
        """The folder of `stage` for `inputs`; `build(folder)` fills a new one. What it raises leaves nothing behind."""
        target = self.root / f"{stage}-{stage_key(stage, inputs)[:40]}"
        if target.is_dir():
            os.utime(target)
            return Built(target, was_cached=True)
        self.root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=self.root, prefix=".building-"))
        try:
            result = staging / "result"
            result.mkdir()
            build(result)
            self._adopt(result, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self.prune(keep=target)
        return Built(target, was_cached=False)

    def prune(self, keep: Path | None = None) -> None:
        """Remove the entries used longest ago until the rest fits; `keep` stays."""
        entries = [entry for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
        total = 0
        for entry in entries:
            total += sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
            if total > self.max_bytes and entry != keep:
                shutil.rmtree(entry, ignore_errors=True)

    def _adopt(self, result: Path, target: Path) -> None:
        try:
            os.rename(result, target)
        except OSError:
            if not target.is_dir():  # another worker was first: its result is as good
                raise


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the stage's name and inputs (plain data)."""
    return sha256(canonical_bytes({"stage": stage, "inputs": dict(inputs)}))
