"""Keeps a set of children running and says so in `state.json`.

One loop, no threads: `run_until` ticks every child until a condition holds, `stop` ends all in reverse order of
starting. The state file is replaced whole whenever something changed, so that others can read it at any time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloud.up.child import STOP_TIMEOUT_S, Child, ChildSpec
from wire.errors import TimedOutError
from wire.process import replace_durably

TICK_S = 0.1


class Supervisor:
    """Owns the children of `foreshore up`."""

    def __init__(
        self,
        state_file: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        on_change: Callable[[Child], None] = lambda child: None,
    ) -> None:
        self.children: dict[str, Child] = {}
        self.addresses: dict[str, str] = {}
        self.is_ready = False  # set by the composition once everything has been started
        self._state_file = state_file
        self._clock = clock
        self._sleep = sleep
        self._on_change = on_change
        self._written: dict[str, Any] = {}

    def start(self, spec: ChildSpec) -> Child:
        """Start a process and keep it running from now on."""
        child = self.children[spec.name] = Child(spec, self._clock)
        child.start()
        self._on_change(child)
        self._write_state()
        return child

    def tick(self) -> None:
        """Look at every child once; tell of those that changed."""
        for child in list(self.children.values()):
            before = (child.state, child.pid)
            child.tick()
            if (child.state, child.pid) != before:
                self._on_change(child)
        self._write_state()

    def run_until(self, is_done: Callable[[], bool], *, timeout_s: float | None = None, what: str = "") -> None:
        """Tick until `is_done()`; `TimedOutError` names `what` after `timeout_s`."""
        deadline = None if timeout_s is None else self._clock() + timeout_s
        while not is_done():
            if deadline is not None and self._clock() >= deadline:
                raise TimedOutError(f"{what} did not become ready in {timeout_s:.0f} s", remedy="see its log")
            self.tick()
            self._sleep(TICK_S)

    def start_and_wait(self, spec: ChildSpec, *, timeout_s: float = 90.0) -> Child:
        """Start a process and return when it is ready; it may have been restarted on the way."""
        child = self.start(spec)
        self.run_until(lambda: child.is_ready, timeout_s=timeout_s, what=f"{spec.name} ({spec.log_file})")
        return child

    def stop(self) -> None:
        """End all children, last started first, killing what does not end in time."""
        children = list(reversed(self.children.values()))
        for child in children:
            child.terminate()
        deadline = self._clock() + STOP_TIMEOUT_S
        for child in children:
            child.wait_stopped(deadline)
            self._on_change(child)
        self._write_state()

    def describe(self) -> dict[str, Any]:
        """All children and addresses as plain data."""
        return {
            "ready": self.is_ready,
            "addresses": dict(self.addresses),
            "children": {
                name: {
                    "pid": child.pid,
                    "state": child.state.value,
                    "restarts": child.num_restarts,
                    "last_exit": child.last_exit,
                    "log": str(child.spec.log_file),
                }
                for name, child in self.children.items()
            },
        }

    def _write_state(self) -> None:
        state = self.describe()
        if state != self._written:
            replace_durably(self._state_file, json.dumps(state, indent=1).encode(), mode=0o600)
            self._written = state
