"""What a model's page shows of a release's quality: gates in words, the trade-off's plot and rows, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from model_registry.manifest import GateResult, RuntimeChoice
from model_registry.quality_plot import plot
from model_registry.quality_report import ArtefactQuality, Point, choice_sentences, published_points, sentence


@dataclass(frozen=True)
class ReleaseQuality:
    """The quality of one release: `sentences` by target in the order of its gates, the plot and the rows beside it."""

    sentences: Mapping[str, list[str]]
    plot: Markup
    points: tuple[Point, ...]
    tools: Mapping[str, Mapping[str, str]]
    runtimes: Mapping[str, tuple[str, ...]]  # by target: what runs it and why


def release_quality(release: Mapping[str, Any]) -> ReleaseQuality:
    """The view of a release as the API gives it."""
    artefacts = [_artefact(one) for one in release.get("artefacts") or ()]
    points = published_points(artefacts)
    name = f"{release.get('name', '')} {release.get('version', '')}"
    return ReleaseQuality(
        sentences={one.target: [sentence(gate) for gate in one.gates] for one in artefacts},
        plot=Markup(plot(points, name, key=f"v{release.get('sequence', 0)}")),
        points=points,
        tools={one.target: one.tools for one in artefacts},
        runtimes={one.target: choice_sentences(one.runtime_choice) for one in artefacts if one.runtime_choice},
    )


def _artefact(document: Mapping[str, Any]) -> ArtefactQuality:
    choice = document.get("runtime_choice")
    return ArtefactQuality(
        target=document["target"],
        runtime=document["runtime"],
        precision=document["precision"],
        size_bytes=document["size_bytes"],
        manifest=document["manifest"],
        gates=tuple(GateResult.model_validate(gate) for gate in document.get("gates") or ()),
        tools=document.get("tools") or {},
        recipe_digest=document.get("recipe_digest"),
        reproducibility=document.get("reproducibility"),
        runtime_choice=RuntimeChoice.model_validate(choice) if choice else None,
    )
