"""Requests of one tensor model on a bounded number of lanes; those that wait together run together.

There is no waiting time: a request that finds a free lane runs at once, and what queued up meanwhile is taken by the
next lane as one batch. Only requests whose inputs agree in type and in all axes but the first are joined.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from edge_agent.runtimes.base import Array
from wire.errors import OverloadedError

WAIT_S = 300.0
Arrays = Mapping[str, Array]


@dataclass(eq=False)
class _Ticket:
    inputs: Arrays
    done: Future[dict[str, Array]] = field(default_factory=Future)

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.inputs.values()), ()))

    @property
    def kind(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        return tuple(sorted((name, value.dtype.str, value.shape[1:]) for name, value in self.inputs.items()))


class TensorLanes:
    """Runs `run(lane, inputs)` on at most `num_lanes` at once, joining up to `max_batch` rows."""

    def __init__(self, run: Callable[[int, Arrays], dict[str, Array]], num_lanes: int, max_batch: int) -> None:
        self._run, self._max_batch = run, max_batch
        self._free_lanes = list(range(num_lanes))
        self._has_lane = threading.Semaphore(num_lanes)
        self._lock = threading.Lock()
        self._waiting: deque[_Ticket] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that no lane has taken yet."""
        return len(self._waiting)

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs for `inputs`. Blocking; raises what the run raised."""
        ticket = _Ticket(inputs)
        with self._lock:
            self._waiting.append(ticket)
        if not self._has_lane.acquire(timeout=WAIT_S):
            self._forget(ticket)
            raise OverloadedError("the wait for the model was too long", remedy="try again", retry_after_s=5)
        with self._lock:
            lane, batch = self._free_lanes.pop(), self._take(ticket)
        try:
            if batch:
                self._answer(lane, batch)
        finally:
            with self._lock:
                self._free_lanes.append(lane)
            self._has_lane.release()
        return ticket.done.result(WAIT_S)

    def _forget(self, ticket: _Ticket) -> None:
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _take(self, ticket: _Ticket) -> list[_Ticket]:
        """`ticket` and those that can run with it; none when another lane took it already."""
        if ticket not in self._waiting:
            return []
        batch, num_rows = [ticket], ticket.num_rows
        for other in self._waiting if self._max_batch > 1 else ():
            if other is not ticket and other.kind == ticket.kind and num_rows + other.num_rows <= self._max_batch:
                batch.append(other)
                num_rows += other.num_rows
        for taken in batch:
            self._waiting.remove(taken)
        return batch

    def _answer(self, lane: int, batch: list[_Ticket]) -> None:
        try:
            if len(batch) == 1:
                batch[0].done.set_result(self._run(lane, batch[0].inputs))
                return
            joined = {name: np.concatenate([one.inputs[name] for one in batch]) for name in batch[0].inputs}
            outputs = self._run(lane, joined)
        except Exception as error:  # noqa: BLE001 - raised again where each request waits
            for one in batch:
                one.done.set_exception(error)
            return
        begin = 0
        for one in batch:
            end = begin + one.num_rows
            one.done.set_result({name: value[begin:end] for name, value in outputs.items()})
            begin = end
