"""What the demo did, as rows for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class StepResult:
    """One step of the story. `facts` holds figures by name; `sentence` is what a person should remember."""

    name: str
    ok: bool
    seconds: float
    sentence: str
    num_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerResult:
    """One request to a device: where it ran and why, as the device itself said."""

    what: str
    device_id: str
    location: str  # "device" or "cloud"
    reason: str
    answer: str
    ttft_ms: float | None = None
    tokens_per_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    path: str = ""  # the cloud's workers, where they answered
    tries: int = 1  # more than one when a process was being restarted


@dataclass
class Report:
    """Everything that happened."""

    steps: list[StepResult] = field(default_factory=list)
    answers: list[AnswerResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every step held."""
        return bool(self.steps) and all(step.ok for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "ok": self.ok,
            "seconds": sum(step.seconds for step in self.steps),
            "steps": [asdict(step) for step in self.steps],
            "answers": [asdict(answer) for answer in self.answers],
        }

    def print(self, console: Console) -> None:
        """Two tables: the steps, then the requests."""
        steps = Table(title="What happened", title_justify="left")
        for column in ("step", "", "seconds", "bytes", "in one sentence"):
            steps.add_column(column, justify="right" if column in {"seconds", "bytes"} else "left")
        for step in self.steps:
            size = "" if step.num_bytes is None else f"{step.num_bytes:,}"
            mark = "[green]ok[/green]" if step.ok else "[red]FAILED[/red]"
            steps.add_row(step.name, mark, f"{step.seconds:.1f}", size, step.sentence)
        console.print(steps)
        answers = Table(title="Where each request ran, and why", title_justify="left")
        for column in ("request", "device", "ran on", "TTFT ms", "tok/s", "cached", "why"):
            answers.add_column(column, justify="right" if column in {"TTFT ms", "tok/s", "cached"} else "left")
        for answer in self.answers:
            ttft = "" if answer.ttft_ms is None else f"{answer.ttft_ms:.0f}"
            speed = "" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f}"
            cached = f"{answer.cached_tokens}/{answer.prompt_tokens}" if answer.prompt_tokens else ""
            place = answer.path or answer.location
            answers.add_row(answer.what, answer.device_id, place, ttft, speed, cached, answer.reason)
        console.print(answers)
