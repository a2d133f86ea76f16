"""The quality report of a compile run: what `compile --report` writes, made of the manifests and the search's tries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compiler.many import TargetResult
from model_registry.quality_pages import render_html
from model_registry.quality_report import ArtefactQuality, QualityReport, artefact_of
from model_registry.sources import Source


def report_of(name: str, source: Source, results: Sequence[TargetResult]) -> QualityReport:
    """The report on all targets of one run; those that failed say why."""
    return QualityReport(name, source.kind, source.digest, tuple(_quality(result) for result in results))


def write_report(report: QualityReport, path: Path) -> None:
    """Write `report` as one HTML file."""
    path.write_text(render_html(report), encoding="utf-8")


def _quality(result: TargetResult) -> ArtefactQuality:
    if result.artefact is None:
        return ArtefactQuality(result.target.name, "", "", 0, "", error=str(result.error))
    classes = {stage.reproducibility for stage in result.artefact.stages}
    weakest = "byte-identical" if classes <= {"byte-identical"} else "output-equivalent"
    return artefact_of(result.artefact.manifest, reproducibility=weakest, notes=result.artefact.notes)
