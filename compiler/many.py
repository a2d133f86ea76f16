"""One model for many targets in one run: the stages that targets agree on are done once, a target that fails is told.

The result is plain data for `--json` and for the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.cache import BuildCache
from compiler.compile_job import CompileJob
from compiler.pipeline import Artefact, compile_model
from compiler.recipe import Recipe
from compiler.source_memo import SourceMemo
from compiler.targets import Target
from model_registry.manifest import Vision
from model_registry.sources import Source, recognise
from wire.errors import ForeshoreError, GateFailedError

SOURCES_FILE = "sources.json"

Show = Callable[[str, str, float, str], None]
"""Called with target, stage, share of the target's job, message."""


@dataclass(frozen=True)
class TargetResult:
    """What became of one target: an artefact or an error."""

    target: Target
    seconds: float
    artefact: Artefact | None = None
    error: ForeshoreError | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        head: dict[str, Any] = {"target": self.target.name, "seconds": round(self.seconds, 3)}
        if self.artefact is None:
            return head | {"error": self.error.to_dict() if self.error else None}
        manifest = self.artefact.manifest
        return head | {
            "manifest": manifest.digest,
            "size_bytes": manifest.size_bytes,
            "runtime": manifest.runtime,
            "precision": manifest.precision,
            "runtime_choice": manifest.runtime_choice.model_dump() if manifest.runtime_choice else None,
            "reproducibility": manifest.reproducibility,
            "engine": manifest.engine.model_dump() if manifest.engine else None,
            "gates": [result.model_dump() for result in manifest.gates],
            "notes": list(self.artefact.notes),
            "tried": [tried.to_dict() for tried in self.artefact.tried],
            "stages": [stage.to_dict() for stage in self.artefact.stages],
        }


def hash_remembered(path: Path, cache: BuildCache) -> Source:
    """The checked source at `path` with its digests; files hashed before are not read again."""
    return SourceMemo(cache.root / SOURCES_FILE).hash_source(recognise(path))


def compile_targets(
    source: Path,
    targets: Sequence[Target],
    recipe: Recipe,
    out: Path,
    cache: BuildCache,
    show: Show,
    *,
    name: str = "model",
    golden: Path | None = None,
    vision: Vision | None = None,
    data: Path | None = None,
) -> list[TargetResult]:
    """Compile `source` for each of `targets` into a folder below `out`. Errors of a target end that target alone."""
    found = hash_remembered(source, cache)
    results = []
    for target in targets:
        job = CompileJob(
            name=name,
            kind=found.kind,
            target=target,
            recipe=recipe,
            source_format=found.format,
            source=source,
            source_digest=found.digest,
            golden=golden,
            vision=vision,
            data=data,
        )
        results.append(_compile_one(job, out, cache, show))
    return results


def _compile_one(job: CompileJob, out: Path, cache: BuildCache, show: Show) -> TargetResult:
    target, started = job.target, time.monotonic()
    try:
        artefact = compile_model(job, out / target.name, cache, lambda *event: show(target.name, *event))
    except ForeshoreError as error:
        return TargetResult(target, time.monotonic() - started, error=error)
    return TargetResult(target, time.monotonic() - started, artefact)


def worst_error(results: Sequence[TargetResult]) -> ForeshoreError | None:
    """The error that the command ends with: a gate that did not hold before any other; None when all is well."""
    errors = [result.error for result in results if result.error is not None]
    return next((error for error in errors if isinstance(error, GateFailedError)), errors[0] if errors else None)
