"""One engine build under its lease, the same for a device and for a builder machine.

Rules: heartbeats go out while the build runs; a lost lease, a caller that no longer wants to or the time limit stops
the build at once; whatever went wrong is told to the control plane with a code, or, if that cannot be reached, left to
the lease's end. How an engine is built, and how it is tried, is the caller's.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model_registry.client import ControlClient, EngineLease
from wire.errors import ConflictError, ForeshoreError, TimedOutError, UnavailableError

BEATS_PER_LEASE = 4


class BuildStoppedError(ForeshoreError):
    """The build was given up before it ended: the lease is lost, or the device has better things to do."""

    code = "build_stopped"


class Build(Protocol):
    """Builds the engine of a lease."""

    def __call__(self, lease: EngineLease, engine: Path, going_on: Callable[[], None]) -> None:
        """Write `engine`; call `going_on` at least every second, which raises when the build is to stop."""


@dataclass(frozen=True)
class Outcome:
    """What became of a lease."""

    lease: EngineLease
    error: ForeshoreError | None = None


class EngineBuilder:
    """Takes leases and works them off, one at a time. Blocking."""

    def __init__(
        self,
        control: ControlClient,
        build: Build,
        folder: Path,
        *,
        keys: Sequence[str] = (),
        wants: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control, self._build, self._folder, self._keys = control, build, folder, keys
        self._wants, self._clock = wants, clock  # `wants` says why it would rather not build now

    def work_once(self) -> Outcome | None:
        """Take a build and finish it; None when there is none, or when it would rather not."""
        if self._wants() is not None:
            return None
        lease = self._control.lease_engine(self._keys)
        if lease is None:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        engine = self._folder / f"{lease.build_id}.engine"
        engine.unlink(missing_ok=True)
        try:
            self._work(lease, engine)
        except ConflictError as error:  # the lease is somebody else's now: nothing to tell
            return Outcome(lease, error)
        except ForeshoreError as error:
            with contextlib.suppress(ConflictError, UnavailableError):
                self._control.fail_engine(lease, error.code, str(error))
            return Outcome(lease, error)
        finally:
            engine.unlink(missing_ok=True)
        return Outcome(lease)

    def _work(self, lease: EngineLease, engine: Path) -> None:
        lost = threading.Event()
        until = self._clock() + lease.limit_s

        def going_on() -> None:
            if lost.is_set():
                raise ConflictError("the lease is lost", remedy="another builds it")
            if self._clock() > until:
                raise TimedOutError(f"the build took more than {lease.limit_s:g} s", remedy="raise the limit")
            rather_not = self._wants()
            if rather_not is not None:
                raise BuildStoppedError(rather_not, remedy="it is built later, or elsewhere")

        with keeping(self._control, lease.build_id, lease.lease_id, lease.lease_s, lost):
            self._build(lease, engine, going_on)
            going_on()
            self._control.hand_in_engine(lease, engine)


@contextlib.contextmanager
def keeping(
    control: ControlClient, build_id: str, lease_id: str, lease_s: float, lost: threading.Event
) -> Iterator[None]:
    """Send heartbeats meanwhile; `lost` is set when the lease is somebody else's."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(lease_s / BEATS_PER_LEASE):
            try:
                control.keep_engine(build_id, lease_id)
            except UnavailableError:
                continue
            except ForeshoreError:
                lost.set()
                return

    beating = threading.Thread(target=beat, name="engine-lease", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join(lease_s)
