"""How a publication looks while it runs: a live table and bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from model_registry.client import JobState, Publication
from model_registry.manifest import GateResult

_MIB = 1 << 20


class PublishView:
    """An `Observer` on a console; live bars only where the console is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(28),
            TextColumn("{task.percentage:>4.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._step: TaskID | None = None
        self._step_name = ""
        self._tasks_by_job: dict[str, TaskID] = {}
        self._last_by_job: dict[str, tuple[str, str]] = {}
        self._gates_shown: set[tuple[str, str]] = set()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, step: str, total: int) -> None:
        """See `publish.Observer`."""
        self._finish_step()
        self._step_name = step
        note = f"{total / _MIB:.1f} MiB" if total else ""
        if step != "compile":  # the jobs are its bars
            self._step = self._progress.add_task(step, total=total or None, note=note)
        self._plain(f"{step} {note}".rstrip())

    def advance(self, amount: int) -> None:
        """See `publish.Observer`."""
        if self._step is not None:
            self._progress.advance(self._step, amount)

    def say(self, text: str) -> None:
        """See `publish.Observer`."""
        self._console.print(text, highlight=False, markup=False)

    def show(self, publication: Publication) -> None:
        """See `publish.Observer`."""
        for job in publication.jobs:
            self._show_job(job)

    def finish(self) -> None:
        """The last step is done."""
        self._finish_step()

    def _finish_step(self) -> None:
        if self._step is not None:
            task = self._progress.tasks[self._progress.task_ids.index(self._step)]
            self._progress.update(self._step, total=task.total or 1, completed=task.total or 1)
            self._step = None

    def _show_job(self, job: JobState) -> None:
        if job.job_id not in self._tasks_by_job:
            self._tasks_by_job[job.job_id] = self._progress.add_task(f"compile {job.target}", total=1.0, note="")
        note = f"{job.state} {job.stage} {job.message}".strip()
        self._progress.update(self._tasks_by_job[job.job_id], completed=job.progress, note=note[:60])
        if self._last_by_job.get(job.job_id) != (job.state, job.stage):
            self._last_by_job[job.job_id] = (job.state, job.stage)
            self._plain(f"compile {job.target}: {note}")
        for gate in job.gates:
            if (job.job_id, gate.name) not in self._gates_shown:
                self._gates_shown.add((job.job_id, gate.name))
                self.say(gate_line(job.target, gate))

    def _plain(self, text: str) -> None:
        if not self._console.is_terminal:
            self.say(text)


def gate_line(target: str, gate: GateResult) -> str:
    """One gate for people."""
    verdict = "holds" if gate.passed else "DOES NOT HOLD"
    return f"gate {target}: {gate.name} = {gate.value:.6g} ({gate.sense} {gate.limit:g}) {verdict}"
