"""One supervised process: start, watch, restart with back-off, stop. No threads; the supervisor's loop calls `tick`.

A child that ends by itself is started again after a delay that doubles with every early death and is forgotten after
`HEALTHY_S` of running. Its output goes to a log file. Children end with their parent, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from wire.tether import tethered

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 15.0
HEALTHY_S = 30.0
STOP_TIMEOUT_S = 10.0
MAX_LOG_BYTES = 16 << 20


class ChildState(StrEnum):
    """Where a child is."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"  # for its restart
    STOPPED = "stopped"


@dataclass(frozen=True)
class ChildSpec:
    """How to start a process. `port_file`, where given, appears when it accepts connections."""

    name: str
    command: tuple[str, ...]
    log_file: Path
    port_file: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def restart_delay_s(early_deaths: int) -> float:
    """Seconds to wait before the next start after `early_deaths` deaths in a row."""
    return float(min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** max(0, early_deaths - 1)))


class Child:
    """A process and its history."""

    def __init__(self, spec: ChildSpec, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.state = ChildState.STOPPED
        self.num_restarts = 0
        self.last_exit: int | None = None
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_at = 0.0
        self._early_deaths = 0

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def is_ready(self) -> bool:
        """Whether the process runs and, if it has a port file, accepts connections."""
        return self.state is ChildState.RUNNING

    def start(self) -> None:
        """Start the process now."""
        spec = self.spec
        if spec.port_file is not None:
            spec.port_file.unlink(missing_ok=True)
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        _rotate(spec.log_file)
        with spec.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                tethered(spec.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment},
                start_new_session=True,
            )
        self._started_at = self._clock()
        self.state = ChildState.STARTING

    def tick(self) -> None:
        """Notice what happened since the last call, and do what is due."""
        if self.state is ChildState.WAITING and self._clock() >= self._start_at:
            self.num_restarts += 1
            self.start()
            return
        if self._process is None:
            return
        exit_code = self._process.poll()
        if exit_code is not None:
            self._ended(exit_code)
        elif self.state is ChildState.STARTING and (self.spec.port_file is None or self.spec.port_file.exists()):
            self.state = ChildState.RUNNING

    def terminate(self) -> None:
        """Ask the process to end."""
        self.state = ChildState.STOPPED
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait_stopped(self, deadline: float) -> None:
        """Wait for the end until `deadline` (of the child's clock), then kill; its whole group goes with it."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.last_exit = self._process.wait(timeout=max(0.0, deadline - self._clock()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self.last_exit is None:
            self.last_exit = self._process.wait(timeout=STOP_TIMEOUT_S)
        self._process = None

    def _ended(self, exit_code: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):  # what the dead process left behind
            os.killpg(self._process.pid, signal.SIGKILL)
        lived_s = self._clock() - self._started_at
        self._early_deaths = 1 if lived_s >= HEALTHY_S else self._early_deaths + 1
        self.last_exit = exit_code
        self._process = None
        self._start_at = self._clock() + restart_delay_s(self._early_deaths)
        self.state = ChildState.WAITING


def _rotate(log_file: Path) -> None:
    if log_file.exists() and log_file.stat().st_size > MAX_LOG_BYTES:
        os.replace(log_file, log_file.with_suffix(".old.log"))
