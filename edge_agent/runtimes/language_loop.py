"""Streams of one language model, interleaved by one thread: each turn reads a chunk of one prompt and decodes one token
of every stream that runs. Streams join and leave between steps; none waits for another one's end.

Order: first come, first served. A stream begins when its prompt and all that it may answer fit into the cache beside
those that run; one alone always does. A cancelled stream leaves before the next step; its own prefill is cut off at
once. A step that fails ends the streams that took part in it, each with the error, and the thread goes on.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import onnxruntime

from edge_agent.runtimes.base import STEP_TIMEOUT_S, Array, Deliver, Piece, Sampling
from edge_agent.runtimes.batch import Batch
from edge_agent.runtimes.decoder_graph import DecoderGraph
from edge_agent.runtimes.json_guide import JsonGuide
from edge_agent.runtimes.sampler import Sampler
from edge_agent.runtimes.stop_text import StopText
from edge_agent.thrift import trim
from wire.errors import UnavailableError

CHUNK_TOKENS = 128
"""Of a prompt, read in one turn: long enough for the kernels, short enough for the streams that wait meanwhile."""

TAIL_TOKENS = 32
"""The last tokens of a prompt, whose logits are computed: so few cost less than a call of their own."""

REST_S = 0.5
"""Without a stream, before free memory goes back to the system."""

IDLE_S = 60.0
R = TypeVar("R")


class Detokenizer(Protocol):
    """Text of one stream's tokens, as it becomes whole."""

    def decode(self, token: int) -> str:
        """The text that `token` completes."""

    def flush(self) -> str:
        """What stayed incomplete."""


@dataclass(eq=False)
class Stream:
    """One request; only the loop's thread changes it, but for `is_cancelled`."""

    prompt: Sequence[int]
    sampling: Sampling
    deliver: Deliver
    detokenizer: Detokenizer
    guide: JsonGuide | None = None
    num_cached: int = 0
    num_tokens: int = 0  # chosen so far
    next_token: int = -1
    is_cancelled: bool = False
    stop: Any = field(default_factory=onnxruntime.RunOptions)  # ends its prefill in the middle
    sampler: Sampler = field(init=False)
    text: StopText = field(init=False)

    @property
    def most_tokens(self) -> int:
        """In the cache at its end."""
        return len(self.prompt) + self.sampling.max_tokens

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling, self.prompt)
        self.text = StopText(self.sampling.stop)


class LanguageLoop:
    """The thread and its queues. The graph's last row is for calls between the steps."""

    def __init__(self, graph: DecoderGraph, eos_tokens: frozenset[int], name: str) -> None:
        self._graph, self._eos_tokens = graph, eos_tokens
        self._batch: Batch[Stream] = Batch(graph.num_rows - 1)
        self._waiting: deque[Stream] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self.max_cached_tokens = sys.maxsize  # of all streams; may change at any time
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"language-{name}", daemon=True)
        self._thread.start()

    @property
    def num_streams(self) -> int:
        """Streams that wait or run."""
        return len(self._waiting) + len(self._batch.decoding) + (self._batch.prefilling is not None)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the cache."""
        return sum(stream.num_cached for stream in self._running())

    def submit(self, stream: Stream) -> None:
        """Queue a stream."""
        with self._changed:
            if self._is_closing:
                raise UnavailableError("the model is being unloaded", remedy="try again")
            self._waiting.append(stream)
            self._changed.notify()

    def cancel(self, stream: Stream) -> None:
        """End a stream; nothing when it has ended."""
        stream.is_cancelled = True
        stream.stop.terminate = True
        with self._changed:
            self._changed.notify()

    def call(self, function: Callable[[int], R]) -> R:
        """Run `function(row)` between two steps, with a row that no stream has. Blocking."""
        result: Future[R] = Future()

        def work() -> None:
            try:
                result.set_result(function(self._graph.num_rows - 1))
            except Exception as error:  # noqa: BLE001 - raised again where it was called
                result.set_exception(error)
            self._graph.free(self._graph.num_rows - 1)

        with self._changed:
            if self._is_closing:
                raise UnavailableError("the model is being unloaded", remedy="try again")
            self._calls.append(work)
            self._changed.notify()
        return result.result(STEP_TIMEOUT_S)

    def close(self) -> None:
        """End every stream and the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(STEP_TIMEOUT_S)

    def _run(self) -> None:
        while self._await_work():
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - top of the thread: every stream hears of it
                self._fail([*self._batch.decoding], error)
        gone = UnavailableError("the model was unloaded", remedy="try again")
        self._fail([*self._waiting, *self._batch.decoding], gone)
        if self._batch.prefilling is not None:
            self._fail([self._batch.prefilling], gone)
        self._waiting.clear()

    def _await_work(self) -> bool:
        with self._changed:
            if not self._changed.wait_for(self._has_work, REST_S):
                trim()  # what the streams needed beside the cache
            while not self._has_work():
                self._changed.wait(IDLE_S)
            return not self._is_closing

    def _has_work(self) -> bool:
        return bool(self._is_closing or self._calls or self.num_streams)

    def _turn(self) -> None:
        while self._calls:
            self._calls.popleft()()
        self._drop_cancelled()
        if self._waiting and self._batch.has_room and self._fits(self._waiting[0]):
            self._batch.join(self._waiting.popleft())
        if self._batch.prefilling is not None:
            self._prefill(self._batch.prefilling)
        if self._batch.decoding:
            self._decode(list(self._batch.decoding))

    def _fits(self, stream: Stream) -> bool:
        reserved = sum(other.most_tokens for other in self._running())
        return not reserved or reserved + stream.most_tokens <= self.max_cached_tokens

    def _running(self) -> list[Stream]:
        """In the order of their rows."""
        prefilling = self._batch.prefilling
        return [*self._batch.decoding, prefilling] if prefilling is not None else list(self._batch.decoding)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [stream for stream in self._waiting if stream.is_cancelled]
            for stream in dropped:
                self._waiting.remove(stream)
        for stream in [*dropped, *(s for s in self._running() if s.is_cancelled)]:
            self._end(stream, Piece(-1, stream.text.flush(), "cancelled"))

    def _prefill(self, stream: Stream) -> None:
        """One chunk; the last one yields the first token."""
        row, left = self._batch.row(stream), len(stream.prompt) - stream.num_cached
        try:
            if left > TAIL_TOKENS:
                # the tail is all that computes logits
                size = min(CHUNK_TOKENS, left - 1)
                chunk = stream.prompt[stream.num_cached : stream.num_cached + size]
                self._graph.prefill(row, chunk, stream.num_cached, stream.stop)
                stream.num_cached += size
                return
            logits = self._graph.score(row, stream.prompt[stream.num_cached :], stream.num_cached)[-1]
            stream.num_cached = len(stream.prompt)
            self._batch.promote()
            self._choose(stream, logits)
        except Exception as error:  # noqa: BLE001 - the stream hears of it, the others go on
            if not stream.is_cancelled:
                self._fail([stream], error)

    def _decode(self, streams: list[Stream]) -> None:
        logits = self._graph.decode([s.next_token for s in streams], [s.num_cached for s in streams])
        for stream in streams:  # all of them, before one that ends lets others move
            stream.num_cached += 1
        for stream, row in zip(streams, logits, strict=True):
            self._choose(stream, row)

    def _choose(self, stream: Stream, logits: Array) -> None:
        """The next token of a stream; delivers its text, or the end."""
        if stream.guide is not None:
            logits = stream.guide.restrict(logits)
        token = stream.sampler.pick(logits)
        stream.num_tokens += 1
        stream.next_token = token
        if token in self._eos_tokens:
            self._end(stream, Piece(token, _rest(stream), "stop"))
            return
        if stream.guide is not None:
            stream.guide.consume(token)
        text = stream.text.push(stream.detokenizer.decode(token))
        if stream.text.is_stopped:
            self._end(stream, Piece(token, text, "stop"))
        elif stream.num_tokens == stream.sampling.max_tokens:
            self._end(stream, Piece(token, text + _rest(stream), "length"))
        else:
            self._deliver(stream, Piece(token, text))

    def _end(self, stream: Stream, last: Piece | Exception) -> None:
        if stream is self._batch.prefilling or any(stream is other for other in self._batch.decoding):
            moves, free_row = self._batch.leave(stream)
            for move in moves:
                self._graph.move(move.source, move.target, self._cached_in(move.target))
            self._graph.free(free_row)
        self._deliver(stream, last)

    def _deliver(self, stream: Stream, piece: Piece | Exception) -> None:
        """A listener that fails ends its own stream and no other one."""
        try:
            stream.deliver(piece)
        except Exception:  # noqa: BLE001 - there is nobody left to tell
            stream.is_cancelled = True

    def _cached_in(self, row: int) -> int:
        """Tokens of the stream that now has `row`."""
        rows = self._running()
        return rows[row].num_cached if row < len(rows) else 0

    def _fail(self, streams: Sequence[Stream], error: Exception) -> None:
        for stream in streams:
            self._end(stream, error)


def _rest(stream: Stream) -> str:
    """What was held back, now that no token comes any more."""
    return stream.text.push(stream.detokenizer.flush()) + stream.text.flush()
