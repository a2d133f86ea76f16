"""The quality report of a model's artefacts: gates, sizes, latencies, the trade-offs tried, and where it all came from.

Data first: `QualityReport` is frozen and versioned; it is made from manifests, which publishers sign with the release,
so every gate in it is covered by a signature. `compiler.report` builds it, `quality_pages` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from model_registry.manifest import GateResult, Manifest, RuntimeChoice, RuntimeOption

SCHEMA = "foreshore.quality/1"

LABELS = {
    "cosine": "cosine of the outputs",
    "relative_error": "relative error of the outputs",
    "top1_agreement": "agreement of the first choice",
    "worst_slice_agreement": "agreement in the worst class",
    "top1_drop": "top-1 accuracy lost",
    "perplexity_ratio": "perplexity against the source's",
    "kl_nats": "divergence from the source (nats)",
    "worst_slice_kl_nats": "divergence in the worst passage (nats)",
    "greedy_agreement": "agreement of the likeliest token",
    "exact_match": "prompts answered alike",
    "tokenizer_match": "texts cut into the same tokens",
    "broken_numbers": "number of infinite or undefined weights",
    "size_ratio": "size against the source's",
    "integer_layer_share": "share of integer layers",
    "latency_ms": "latency of one case (ms)",
    "memory_bytes": "memory (bytes)",
}
ACCURACY = ("top1_agreement", "greedy_agreement", "cosine")


def sentence(result: GateResult) -> str:
    """A gate in words: what was measured, how much, what was demanded, and the verdict."""
    label = LABELS.get(result.name, result.name.replace("_", " "))
    demand = "at most" if result.sense == "<=" else "at least"
    measured = "is not a number" if abs(result.value) >= 1e308 else f"is {result.value:.4g}"
    return f"The {label} {measured}; {demand} {result.limit:.4g} was demanded: {'held' if result.passed else 'failed'}."


def choice_sentences(choice: RuntimeChoice) -> tuple[str, ...]:
    """The runtime chosen and those that were not, each with its reason and figures."""
    basis = {"measured": "by measurement", "rule": "by rule", "recipe": "by the recipe"}[choice.basis]
    rejected = [f"Not {option.runtime}: {_told(option)}." for option in choice.rejected]
    return (f"Run by {choice.chosen.runtime}, chosen {basis}: {_told(choice.chosen)}.", *rejected)


def _told(option: RuntimeOption) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in sorted(option.figures.items()))
    return f"{option.reason} ({figures})" if figures else option.reason


@dataclass(frozen=True)
class Point:
    """One place in the trade-off of size, latency and accuracy (a share; 1 is the source's own)."""

    label: str
    size_bytes: int
    accuracy: float
    latency_ms: float | None = None
    is_published: bool = False
    is_on_front: bool = True
    holds: bool = True


@dataclass(frozen=True)
class ArtefactQuality:
    """One target's artefact: what it is, what its gates say, and its provenance."""

    target: str
    runtime: str
    precision: str
    size_bytes: int
    manifest: str
    gates: tuple[GateResult, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    recipe_digest: str | None = None
    reproducibility: str | None = None
    notes: tuple[str, ...] = ()
    runtime_choice: RuntimeChoice | None = None
    error: str | None = None

    @property
    def accuracy(self) -> float | None:
        """The first of `ACCURACY` that its gates measured."""
        return accuracy_of(self.gates)

    @property
    def latency_ms(self) -> float | None:
        """The latency that a gate measured, if one did."""
        return next((gate.value for gate in self.gates if gate.name == "latency_ms"), None)


@dataclass(frozen=True)
class QualityReport:
    """Everything about one compiled model that a person decides by."""

    name: str
    kind: str
    source_digest: str
    artefacts: tuple[ArtefactQuality, ...]
    searched: tuple[Point, ...] = ()
    schema: str = SCHEMA

    @property
    def points(self) -> tuple[Point, ...]:
        """What was published, then what the search tried: the plot's and its table's rows."""
        return marked((*published_points(self.artefacts), *self.searched))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        document = asdict(self)
        for artefact, plain in zip(self.artefacts, document["artefacts"], strict=True):
            plain["gates"] = [gate.model_dump(mode="json") for gate in artefact.gates]
            choice = artefact.runtime_choice
            plain["runtime_choice"] = choice.model_dump(mode="json") if choice else None
        return document


def artefact_of(manifest: Manifest, *, notes: Sequence[str] = ()) -> ArtefactQuality:
    """The quality of the artefact that `manifest` describes."""
    return ArtefactQuality(
        target=manifest.target,
        runtime=manifest.runtime,
        precision=manifest.precision,
        size_bytes=manifest.size_bytes,
        manifest=manifest.digest,
        gates=tuple(manifest.gates),
        tools=dict(manifest.tools),
        recipe_digest=manifest.recipe_digest,
        reproducibility=manifest.reproducibility,
        runtime_choice=manifest.runtime_choice,
        notes=tuple(notes),
    )


def accuracy_of(gates: Sequence[GateResult]) -> float | None:
    """The first of `ACCURACY` that was measured and is a number."""
    by_name = {gate.name: gate.value for gate in gates if abs(gate.value) < 1e308}
    return next((by_name[name] for name in ACCURACY if name in by_name), None)


def published_points(artefacts: Sequence[ArtefactQuality]) -> tuple[Point, ...]:
    """The artefacts as points, the front marked; one that failed or measured no accuracy is none."""
    found = []
    for one in artefacts:
        accuracy = one.accuracy
        if accuracy is not None and one.error is None:
            label, holds = f"{one.target} ({one.precision})", all(gate.passed for gate in one.gates)
            found.append(Point(label, one.size_bytes, accuracy, one.latency_ms, is_published=True, holds=holds))
    return marked(found)


def marked(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points with their front marked anew: what no other beats in size or accuracy and equals in the other."""
    return tuple(replace(one, is_on_front=not any(_beats(other, one) for other in points)) for one in points)


def _beats(one: Point, other: Point) -> bool:
    return (
        one.size_bytes <= other.size_bytes
        and one.accuracy >= other.accuracy
        and (one.size_bytes, one.accuracy) != (other.size_bytes, other.accuracy)
    )
