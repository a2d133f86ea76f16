"""The engine's own thread, and the asyncio side that talks to it.

Rules: the engine is touched by its thread alone; others hand in functions (`call`), which run between steps. Events go
back to the loop once per step. When a step raises, every open stream ends with that error and `failure` is set: the
process is expected to exit, because the state of the batch is unknown.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from cloud.serving.engine import Engine, StepEvent
from cloud.serving.request import Request
from wire.errors import ConflictError, ForeshoreError, TimedOutError, UnavailableError

T = TypeVar("T")
_IDLE_WAIT_S = 1.0
_CALL_TIMEOUT_S = 60.0


class EngineThread:
    """Runs an `Engine`; create, `start` and use it from one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[StepEvent | BaseException]] = {}
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start stepping."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Stop after the step in progress. Open streams are not waited for."""
        self._is_stopping = True
        self._inbox.put(_nothing)
        await asyncio.to_thread(self._thread.join, 30.0)

    @property
    def num_streams(self) -> int:
        """Requests that somebody is reading."""
        return len(self._streams)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the engine's thread, between two steps, and return its result or raise its error."""
        if self.failure is not None:
            raise UnavailableError(f"the engine has failed: {self.failure}", remedy="restart the worker")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - it reaches the caller
                loop.call_soon_threadsafe(_set_exception, future, error)
            else:
                loop.call_soon_threadsafe(_set_result, future, result)

        self._inbox.put(run)
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await future
        except TimeoutError as error:
            raise TimedOutError("the engine did not answer", remedy="see the worker's log") from error

    def post(self, function: Callable[[], Any]) -> None:
        """Run `function` in the engine's thread some time soon; its result is not wanted and it must not raise."""
        self._inbox.put(function)

    @asynccontextmanager
    async def submit(self, request: Request) -> AsyncIterator[AsyncIterator[StepEvent]]:
        """Queue `request` and read its events; leaving the block early cancels it and frees its blocks."""
        events: asyncio.Queue[StepEvent | BaseException] = asyncio.Queue()  # bounded by the request's own tokens
        scheduler = self.engine.scheduler
        if request.request_id in self._streams:
            raise ConflictError(f"request id {request.request_id!r} is in use", remedy="use a fresh id per request")
        self._streams[request.request_id] = events
        try:
            await self.call(lambda: scheduler.add(request))
            async with aclosing(_read(events)) as reader:
                yield reader
        finally:
            del self._streams[request.request_id]
            self.post(lambda: _withdraw(self.engine, request))

    def end(self, request_id: str, error: ForeshoreError) -> bool:
        """Have whoever reads this request's events get `error` after those that have come; False if nobody does."""
        events = self._streams.get(request_id)
        if events is not None:
            events.put_nowait(error)
        return events is not None

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._serve_inbox()
                if self.engine.has_work:
                    events = self.engine.step()
                    if events:
                        self._notify(events)
        except BaseException as error:  # noqa: BLE001 - every open stream and the worker's main task see it
            self._notify(error)

    def _serve_inbox(self) -> None:
        """Run what was handed in; with nothing to do, wait for something."""
        timeout = 0.0 if self.engine.has_work else _IDLE_WAIT_S
        try:
            self._inbox.get(timeout=timeout)() if timeout else self._inbox.get_nowait()()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _notify(self, news: list[StepEvent] | BaseException) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, news)

    def _dispatch(self, news: list[StepEvent] | BaseException) -> None:
        if isinstance(news, BaseException):
            self.failure = news
            self.failed.set()
            for stream in self._streams.values():
                stream.put_nowait(news)
            return
        for event in news:
            stream_or_none = self._streams.get(event.request_id)
            if stream_or_none is not None:
                stream_or_none.put_nowait(event)


async def _read(events: asyncio.Queue[StepEvent | BaseException]) -> AsyncGenerator[StepEvent, None]:
    while True:
        event = await events.get()
        if isinstance(event, ForeshoreError):
            raise event
        if isinstance(event, BaseException):
            raise UnavailableError(f"the engine has failed: {event!r}", remedy="the worker restarts") from event
        yield event
        if event.finish_reason is not None:
            return


def _withdraw(engine: Engine, request: Request) -> None:
    """Cancel the request if it still runs. It may never have been added: then only its held blocks are its own."""
    if request.arrival and request.finish_reason is None:
        engine.scheduler.cancel(request.request_id)
    elif request.arrival:
        engine.scheduler.release(request.request_id)
    elif request.held_block_ids:
        engine.pool.free(request.held_block_ids)
        request.held_block_ids = []


def _nothing() -> None:
    return None


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
