"""Engines on disk, below `store/engines/{digest of the document}`: `engine`, `document.json`, and why it was `refused`.

A document lies here only after its digest was found in a publisher's list; the engine beside it is hashed again before
every load. A refused engine stays, so that it is not fetched and tried for ever.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from model_registry.manifest import MAX_ENGINE_DOCUMENT_BYTES, EngineBuild, parse_engine_build
from wire.errors import ForeshoreError, IntegrityError
from wire.process import replace_durably


class EngineShelf:
    """What was accepted, and what was tried and refused."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, document: str) -> Path:
        """Where the engine of a document lies."""
        return self._folder / document / "engine"

    def accept(self, built: EngineBuild) -> Path:
        """Keep a proven document; the place for its engine."""
        path = self.path(built.digest)
        replace_durably(path.with_name("document.json"), built.to_bytes())
        return path

    def find(self, manifest: str, hardware_key: str) -> EngineBuild | None:
        """The accepted engine of an artefact for this hardware, if it was not refused since."""
        for folder in sorted(self._folder.glob("*")):
            built = self._read(folder)
            if built is None or self.refusal(built.digest) is not None:
                continue
            if (built.manifest, built.hardware_key) == (manifest, hardware_key) and self.path(built.digest).exists():
                return built
        return None

    def check(self, built: EngineBuild) -> Path:
        """The engine's file, whose bytes are those of the document; `IntegrityError` otherwise, and it is gone."""
        path = self.path(built.digest)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != built.engine or path.stat().st_size != built.size_bytes:
            path.unlink()
            raise IntegrityError("the engine on disk is not what was signed", remedy="it is fetched again")
        return path

    def refuse(self, document: str, reason: str) -> None:
        """Remember that an engine is no good here."""
        replace_durably(self._folder / document / "refused", reason.encode()[:2000])
        self.path(document).unlink(missing_ok=True)

    def refusal(self, document: str) -> str | None:
        """Why an engine is no good here."""
        file = self._folder / document / "refused"
        return file.read_text(errors="replace") if file.exists() else None

    def keep(self, manifests: set[str]) -> None:
        """Delete what was built from other artefacts than these."""
        for folder in self._folder.glob("*"):
            built = self._read(folder)
            if built is None or built.manifest not in manifests:
                shutil.rmtree(folder, ignore_errors=True)

    def _read(self, folder: Path) -> EngineBuild | None:
        file = folder / "document.json"
        try:
            if file.stat().st_size > MAX_ENGINE_DOCUMENT_BYTES:
                return None
            return parse_engine_build(file.read_bytes(), expected_digest=folder.name)
        except (OSError, ForeshoreError):
            return None
