"""The quality report of a compile run: what `compile --report` writes, made of the manifests and the search's tries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compiler.many import TargetResult
from model_registry.manifest import GateResult
from model_registry.quality_pages import render_html
from model_registry.quality_report import ArtefactQuality, Point, QualityReport, accuracy_of, artefact_of
from model_registry.sources import Source


def report_of(name: str, source: Source, results: Sequence[TargetResult]) -> QualityReport:
    """The report on all targets of one run; those that failed say why."""
    artefacts = tuple(_quality(result) for result in results)
    return QualityReport(name, source.kind, source.digest, artefacts, _searched(results))


def write_report(report: QualityReport, path: Path) -> None:
    """Write `report` as one HTML file."""
    path.write_text(render_html(report), encoding="utf-8")


def _searched(results: Sequence[TargetResult]) -> tuple[Point, ...]:
    """What was tried and not taken, each graph once however many targets tried it."""
    points: dict[tuple[str, int], Point] = {}
    for result in results:
        if result.artefact is None:
            continue
        taken = result.artefact.manifest.gates
        for tried in result.artefact.tried:
            if all(gate in taken for gate in tried.gates):
                continue  # what was published has its own point
            accuracy = accuracy_of(tried.gates)
            if accuracy is not None:
                holds = all(gate.passed for gate in tried.gates)
                point = Point(f"{result.target.name}: {tried.label}", tried.size_bytes, accuracy, holds=holds)
                points.setdefault((tried.label, tried.size_bytes), point)
    return tuple(points.values())


def _quality(result: TargetResult) -> ArtefactQuality:
    if result.artefact is None:
        measured = result.error.details.get("gates", ()) if result.error else ()
        gates = tuple(GateResult.model_validate(gate) for gate in measured)
        return ArtefactQuality(result.target.name, "", "", 0, "", gates, error=str(result.error))
    return artefact_of(result.artefact.manifest, notes=result.artefact.notes)
