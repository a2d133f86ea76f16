"""Which tokens of which requests run in the next step.

Rules, in order:
1. Running requests go first, strongest first (priority, then arrival). Each decoding request has one token of budget
   reserved, so a long prompt never delays a token of a running answer by more than one chunk.
2. A prompt is computed in chunks of at most `max_chunk_tokens`; the rest follows in later steps.
3. When blocks run out, blocks held for waiting requests go first, then the weakest running request is preempted: its
   blocks are freed (their names stay findable), its tokens stay, and it is computed again later.
4. A waiting request is admitted when its known tokens fit, strongest first; cached prefixes are not computed again.
5. The queue is bounded; a full queue refuses with the time after which trying again makes sense.
6. An embedding is a prompt without an answer. A mean over all tokens starts at the first one, whatever is cached; it
   starts again after a preemption.

Pure: no torch, no clock. `schedule` decides, `complete` records what a step produced.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cloud.serving.block_pool import BlockPool
from cloud.serving.request import FinishReason, Pooling, Request, State
from wire.errors import ConflictError, InvalidInputError, OverloadedError

ParkedBlocks = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one engine. `max_context_tokens` bounds prompt plus output, or the input of an embedding."""

    max_batch_tokens: int = 1024
    max_chunk_tokens: int = 256
    max_running: int = 64
    max_waiting: int = 256
    max_context_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.max_running >= self.max_batch_tokens:
            raise InvalidInputError(
                f"max_running {self.max_running} leaves no room in a batch of {self.max_batch_tokens} tokens",
                remedy="raise max_batch_tokens above max_running",
            )


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + num_tokens) of a request, to run in this step."""

    request: Request
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """Context length after this chunk."""
        return self.start + self.num_tokens

    @property
    def is_sampled(self) -> bool:
        """True when this chunk reaches the last known token, so the next one is drawn from its last row."""
        return self.end == self.request.num_tokens and self.request.is_generating

    @property
    def is_last_of_input(self) -> bool:
        """True when this chunk completes the vector of an embedding."""
        return self.end == self.request.num_tokens and self.request.pooling is not None

    @property
    def output_rows(self) -> range:
        """Tokens of the chunk whose last hidden states are used: to draw from, or to pool."""
        if self.request.pooling is Pooling.MEAN:
            return range(self.num_tokens)
        return range(self.num_tokens - 1, self.num_tokens) if self.is_sampled or self.is_last_of_input else range(0)


class Scheduler:
    """Continuous batching over a `BlockPool`."""

    def __init__(self, pool: BlockPool, config: SchedulerConfig, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.pool = pool
        self.config = config
        self.eos_token_ids = eos_token_ids
        self.max_tokens = min(config.max_context_tokens, pool.num_blocks * pool.block_size)
        self.waiting: list[Request] = []  # sorted by rank
        self.running: list[Request] = []  # sorted by rank
        self.num_preemptions = 0
        self._by_id: dict[str, Request] = {}
        self._parked: dict[str, list[int]] = {}  # full blocks of prefill-only requests, until they are sent
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """True when a step could do something."""
        return bool(self.waiting or self.running)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens that are queued or still to be computed; the router's measure of prefill load."""
        return sum(r.num_uncomputed_tokens for r in self.waiting) + sum(
            r.num_uncomputed_tokens for r in self.running if r.num_uncomputed_tokens > 1
        )

    def check_admission(self, num_tokens: int, *, is_embedding: bool = False) -> None:
        """Raise what `add` would raise for a prompt of this size, before any work is spent on it."""
        if is_embedding and num_tokens > self.max_tokens:
            raise InvalidInputError(
                f"the input has {num_tokens} tokens and the context holds {self.max_tokens}",
                remedy=f"send at most {self.max_tokens} tokens per input",
                param="input",
                reason="context_length_exceeded",
            )
        if not is_embedding and num_tokens >= self.max_tokens:
            raise InvalidInputError(
                f"the prompt has {num_tokens} tokens and the context holds {self.max_tokens} with the answer",
                remedy=f"send fewer than {self.max_tokens} tokens",
                param="messages",
                reason="context_length_exceeded",
            )
        if len(self.waiting) >= self.config.max_waiting:
            raise OverloadedError(
                f"{len(self.waiting)} requests are waiting already", remedy="try again later", retry_after_s=1.0
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises for a prompt that can never fit, a full queue, or an id in use."""
        self.check_admission(request.num_tokens, is_embedding=request.pooling is not None)
        if request.request_id in self._by_id or request.request_id in self._parked:
            raise ConflictError(f"request id {request.request_id!r} is in use", remedy="use a fresh id per request")
        self._arrivals += 1
        request.arrival = self._arrivals
        self._by_id[request.request_id] = request
        bisect.insort(self.waiting, request, key=_rank)

    def cancel(self, request_id: str) -> Request | None:
        """End a request now and free its blocks; None when it is not here (it may have finished)."""
        request = self._by_id.get(request_id)
        if request is not None:
            self._finish(request, FinishReason.CANCELLED)
        self.release(request_id)
        return request

    def release(self, request_id: str) -> None:
        """Let go of all blocks that a prefill-only request keeps for its receiver."""
        self.pool.free(self._parked.pop(request_id, []))

    def unpark(self, request_id: str, blocks: Sequence[int]) -> None:
        """Let go of blocks that were sent."""
        parked = self._parked.get(request_id)
        if parked is None:
            return
        for block in blocks:
            parked.remove(block)
        self.pool.free(blocks)

    def _park_new_blocks(self, request: Request) -> list[tuple[int, int]]:
        """(index, block) of a prefill-only request's full blocks that were not handed out yet, each now referenced.

        The reference outlives preemption and the end of the request, so a block stays as it is while it is sent.
        """
        new = list(enumerate(request.block_ids[: request.num_sealed_blocks]))[request.num_parked_blocks :]
        self.pool.lock([block for _, block in new])
        self._parked.setdefault(request.request_id, []).extend(block for _, block in new)
        request.num_parked_blocks = max(request.num_parked_blocks, request.num_sealed_blocks)
        return new

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks and allocate their blocks. May be empty."""
        chunks: list[Chunk] = []
        num_decoding = sum(1 for r in self.running if r.num_uncomputed_tokens == 1)
        prefill_budget = self.config.max_batch_tokens - num_decoding
        preempted = self.num_preemptions
        for request in list(self.running):
            if request.state is not State.RUNNING:
                continue
            wanted = request.num_uncomputed_tokens
            count = 1 if wanted == 1 else min(wanted, prefill_budget, self.config.max_chunk_tokens)
            if count < 1 or not self._make_room(request, request.num_computed_tokens + count):
                continue
            if wanted > 1:
                prefill_budget -= count
            chunks.append(Chunk(request, request.num_computed_tokens, count))
        if self.num_preemptions == preempted:
            self._admit(chunks, prefill_budget)
        return chunks

    def complete(self, chunks: Sequence[Chunk], sampled: Iterable[int | None]) -> ParkedBlocks:
        """Record a finished step: computed tokens, full blocks, new tokens and who is done.

        `sampled` holds one token per chunk, None where the chunk draws none. Returns the blocks that prefill-only
        requests completed, as (index, block) per request id; they stay as they are until `unpark` or `release`.
        """
        parked: ParkedBlocks = {}
        for chunk, token in zip(chunks, sampled, strict=True):
            request = chunk.request
            if request.state is not State.RUNNING:
                continue
            request.num_computed_tokens = chunk.end
            self._seal_full_blocks(request)
            if request.is_prefill_only:
                parked[request.request_id] = self._park_new_blocks(request)
            if token is not None:
                request.token_ids.append(token)
            reason = self._finish_reason(request, token)
            if reason is not None:
                self._finish(request, reason)
        return parked

    def check_integrity(self) -> None:
        """Raise `AssertionError` when requests and blocks disagree. For tests and idle moments."""
        self.pool.check_integrity()
        counted = [0] * self.pool.num_blocks
        for request in self._by_id.values():
            for block in (*request.block_ids, *request.held_block_ids):
                counted[block] += 1
            assert len(set(request.block_ids)) == len(request.block_ids), "a block is twice in one table"
            assert len(request.block_ids) * self.pool.block_size >= request.num_computed_tokens, "tokens without block"
        for blocks in self._parked.values():
            for block in blocks:
                counted[block] += 1
        for block, count in enumerate(counted):
            assert self.pool.references(block) == count, f"block {block}: {count} users, pool disagrees"
        assert [r.rank for r in self.waiting] == sorted(r.rank for r in self.waiting)
        assert [r.rank for r in self.running] == sorted(r.rank for r in self.running)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.config.max_running:
            request = self.waiting[0]
            hits = self._find_cached(request)
            num_cached = len(hits) * self.pool.block_size
            count = min(request.num_tokens - num_cached, budget, self.config.max_chunk_tokens)
            if not self._can_start(request, hits):
                if self.running or not self._drop_holds(spare=request):
                    return
                continue
            self.waiting.pop(0)
            self.pool.lock(hits)
            self.pool.free(request.held_block_ids)
            request.held_block_ids = []
            request.block_ids = hits
            request.num_computed_tokens = num_cached
            request.num_sealed_blocks = len(hits)
            if request.num_cached_tokens is None:
                request.num_cached_tokens = num_cached
            request.state = State.RUNNING
            bisect.insort(self.running, request, key=_rank)
            if not self._grow(request, num_cached + count):
                self._preempt(request)
                return
            chunks.append(Chunk(request, num_cached, count))
            budget -= count

    def _find_cached(self, request: Request) -> list[int]:
        """Cached blocks to start from; the last token is always computed, because the next one is drawn from it."""
        if request.pooling is Pooling.MEAN:
            return []
        size = self.pool.block_size
        usable = (request.num_tokens - 1) // size
        if request.is_prefill_only:
            usable = max(0, request.num_tokens // size - 1)
        # the first miss ends the hashing too: the rest is hashed when it is sealed, while the device works
        return self.pool.find_prefix(itertools.islice(request.hashes(size), usable))

    def _can_start(self, request: Request, hits: list[int]) -> bool:
        """Whether all known tokens and one more block fit, so that admission does not lead straight to preemption."""
        needed = self._num_blocks_for(request.num_tokens + (request.pooling is None)) - len(hits)
        leaving = self.pool.num_free_among(hits)
        returning = sum(1 for b in request.held_block_ids if self.pool.references(b) == 1 and b not in hits)
        slack = 1 if self.running else 0
        return self.pool.num_free - leaving + returning >= needed + slack

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Give `request` blocks for `num_tokens`; False when it was itself the weakest and has been preempted."""
        while not self._grow(request, num_tokens):
            if self._drop_holds(spare=None):
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _grow(self, request: Request, num_tokens: int) -> bool:
        missing = self._num_blocks_for(num_tokens) - len(request.block_ids)
        if missing <= 0:
            return True
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        request.block_ids.extend(blocks)
        return True

    def _drop_holds(self, spare: Request | None) -> bool:
        """Give up received blocks of one waiting request, weakest first; they stay findable until evicted."""
        for request in reversed(self.waiting):
            if request.held_block_ids and request is not spare:
                self.pool.free(request.held_block_ids)
                request.held_block_ids = []
                return True
        return False

    def _preempt(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_sealed_blocks = 0
        request.num_preemptions += 1
        request.state = State.WAITING
        self.num_preemptions += 1
        self.running.remove(request)
        bisect.insort(self.waiting, request, key=_rank)

    def _seal_full_blocks(self, request: Request) -> None:
        full = request.num_computed_tokens // self.pool.block_size
        if full <= request.num_sealed_blocks:
            return
        names = itertools.islice(request.hashes(self.pool.block_size), request.num_sealed_blocks, full)
        for index, name in enumerate(names, request.num_sealed_blocks):
            self.pool.seal(request.block_ids[index], name)
        request.num_sealed_blocks = full

    def _finish_reason(self, request: Request, token: int | None) -> FinishReason | None:
        if request.is_prefill_only:
            return FinishReason.PREFILLED if request.num_uncomputed_tokens == 0 else None
        if request.pooling is not None:
            return FinishReason.EMBEDDED if request.num_uncomputed_tokens == 0 else None
        if token is None:
            return None
        if token in request.params.stop_token_ids or (token in self.eos_token_ids and not request.params.ignore_eos):
            return FinishReason.STOP
        if request.num_output_tokens >= request.params.max_tokens or request.num_tokens >= self.max_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.state is State.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pool.free(request.block_ids)
        request.block_ids = []
        self.pool.free(request.held_block_ids)
        request.held_block_ids = []
        request.state = State.FINISHED
        request.finish_reason = reason
        del self._by_id[request.request_id]

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
