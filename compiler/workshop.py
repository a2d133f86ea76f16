"""Where a job's stages are run: the cache, the progress that people see, and the list of what was done.

`run` is the one way to build anything, so nothing is built outside the cache and nothing is built unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compiler.cache import BuildCache, Built, Stage
from compiler.progress import Progress
from model_registry.manifest import ArtefactReproducibility


@dataclass(frozen=True)
class StageReport:
    """One stage as a job's report lists it."""

    stage: str
    key: str
    was_cached: bool
    seconds: float
    reproducibility: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dict(vars(self))


def reproducibility_of(reports: Sequence[StageReport]) -> ArtefactReproducibility:
    """The weakest class of the stages that an artefact came from; figures of time are none of its bytes."""
    classes = {report.reproducibility for report in reports} - {"timing"}
    return "byte-identical" if classes <= {"byte-identical"} else "output-equivalent"


class Workshop:
    """Runs the stages of one job."""

    def __init__(self, cache: BuildCache, progress: Progress) -> None:
        self.cache = cache
        self.progress = progress
        self.reports: list[StageReport] = []

    def run(self, stage: Stage, message: str) -> Built:
        """The result of `stage`, built now if it is not in the cache."""
        built = self.cache.find(stage)
        if built is not None:
            self.progress.skip(stage.name)
        else:
            with self.progress.running(stage.name, message):
                built = self.cache.get_or_build(stage)
        self.reports.append(StageReport(built.name, built.key, built.was_cached, built.seconds, built.reproducibility))
        return built
