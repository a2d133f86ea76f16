"""The scheduler under random orders of arrival, cancellation, hand-off and release: nothing leaks, all finish."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cloud.serving.block_pool import BlockPool, chain_root
from cloud.serving.request import FinishReason, Pooling, Request, SamplingParams, State
from cloud.serving.scheduler import Chunk, Scheduler, SchedulerConfig
from wire.errors import ForeshoreError

ROOT = chain_root("model", b"tenant")
BLOCK = 4


def next_token(token_ids: list[int]) -> int:
    """A stand-in for the model: the next token depends on all tokens before it."""
    return hash(tuple(token_ids)) % 50


def note_states(chunk: Chunk) -> None:
    """Keep what a mean needs: every hidden state from the first one on, each once; a start at 0 begins anew."""
    seen: list[int] = chunk.request.__dict__.setdefault("seen_positions", [])
    if chunk.start == 0:
        seen.clear()
    seen += [chunk.start + row for row in chunk.output_rows]


def run_step(scheduler: Scheduler) -> None:
    chunks = scheduler.schedule()
    config = scheduler.config
    assert sum(c.num_tokens for c in chunks) <= config.max_batch_tokens
    assert len({id(c.request) for c in chunks}) == len(chunks)
    for chunk in chunks:
        assert 1 <= chunk.num_tokens <= config.max_chunk_tokens
        assert len(chunk.request.block_ids) * BLOCK >= chunk.end, "a chunk without blocks"
        note_states(chunk)
    scheduler.complete(chunks, [next_token(c.request.token_ids) if c.is_sampled else None for c in chunks])
    scheduler.check_integrity()


class SchedulerMachine(RuleBasedStateMachine):
    """Random events; at the end of each run everything drains and every block is free again."""

    @initialize(blocks=st.integers(3, 24), running=st.integers(1, 4), chunk=st.integers(1, 9))
    def start(self, blocks: int, running: int, chunk: int) -> None:
        self.pool = BlockPool(blocks, BLOCK)
        config = SchedulerConfig(
            max_batch_tokens=running + 1 + chunk, max_chunk_tokens=chunk, max_running=running, max_waiting=6
        )
        self.scheduler = Scheduler(self.pool, config)
        self.accepted: list[Request] = []

    @rule(
        prefix=st.integers(0, 2),
        length=st.integers(1, 40),
        outputs=st.integers(1, 20),
        priority=st.integers(0, 2),
        kind=st.sampled_from(("answer", "answer", "prefill", *Pooling)),
    )
    def add(self, prefix: int, length: int, outputs: int, priority: int, kind: str) -> None:
        request = Request(
            f"r{len(self.accepted)}-{prefix}-{length}",
            [prefix] * length,
            ROOT,
            SamplingParams(max_tokens=outputs),
            priority=priority,
            is_prefill_only=kind == "prefill",
            pooling=kind if isinstance(kind, Pooling) else None,
        )
        try:
            self.scheduler.add(request)
        except ForeshoreError:
            return
        self.accepted.append(request)

    @rule(data=st.data())
    def hold_received_blocks(self, data: st.DataObject) -> None:
        waiting = [r for r in self.scheduler.waiting if not r.held_block_ids and r.pooling is None]
        if not waiting:
            return
        request = data.draw(st.sampled_from(waiting))
        names = list(request.hashes(BLOCK))
        blocks = self.pool.allocate(min(len(names), 2))
        if blocks:
            for block, name in zip(blocks, names, strict=False):
                self.pool.seal(block, name)
            request.held_block_ids = blocks
        elif blocks is not None:
            self.pool.free(blocks)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.accepted:
            self.scheduler.cancel(data.draw(st.sampled_from(self.accepted)).request_id)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            run_step(self.scheduler)

    @rule()
    def release(self) -> None:
        for request in self.accepted:
            self.scheduler.release(request.request_id)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert len(self.scheduler.waiting) <= 6 + self.scheduler.config.max_running

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            run_step(self.scheduler)
            self.release()
        assert not self.scheduler.has_work, "a request never finished"
        self.release()
        assert self.pool.num_free == self.pool.num_blocks
        for request in self.accepted:
            assert request.state is State.FINISHED
            if request.finish_reason is FinishReason.EMBEDDED:
                assert request.num_output_tokens == 0
                first = 0 if request.pooling is Pooling.MEAN else request.num_tokens - 1
                assert request.__dict__["seen_positions"] == list(range(first, request.num_tokens))
            if request.finish_reason is FinishReason.LENGTH:
                expected = list(request.token_ids[: request.num_prompt_tokens])
                while len(expected) < request.num_tokens:
                    expected.append(next_token(expected))
                assert request.token_ids == expected


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(4, 30))
@settings(max_examples=60, deadline=None)
def test_a_small_pool_preempts_and_still_finishes_everyone(lengths: list[int], blocks: int) -> None:
    pool = BlockPool(blocks, BLOCK)
    scheduler = Scheduler(pool, SchedulerConfig(max_batch_tokens=16, max_chunk_tokens=8, max_running=8))
    requests = [Request(str(i), [i] * n, ROOT, SamplingParams(max_tokens=12)) for i, n in enumerate(lengths)]
    accepted = []
    for request in requests:
        if request.num_tokens < scheduler.max_tokens:
            scheduler.add(request)
            accepted.append(request)
    for _ in range(5000):
        if not scheduler.has_work:
            break
        run_step(scheduler)
    assert all(r.finish_reason is FinishReason.LENGTH for r in accepted)
    assert pool.num_free == pool.num_blocks


def test_a_waiting_prompt_is_served_from_the_prefix_cache() -> None:
    pool = BlockPool(16, BLOCK)
    scheduler = Scheduler(pool, SchedulerConfig())
    prompt = list(range(11))
    first = Request("a", list(prompt), ROOT, SamplingParams(max_tokens=1))
    second = Request("b", list(prompt), ROOT, SamplingParams(max_tokens=1))
    stranger = Request("c", list(prompt), chain_root("model", b"another tenant"), SamplingParams(max_tokens=1))
    for request in (first, second, stranger):
        scheduler.add(request)
        while scheduler.has_work:
            run_step(scheduler)
    assert (first.num_cached_tokens, second.num_cached_tokens, stranger.num_cached_tokens) == (0, 8, 0)


def test_a_long_prompt_delays_a_running_answer_by_one_chunk_only() -> None:
    scheduler = Scheduler(BlockPool(64, BLOCK), SchedulerConfig(max_batch_tokens=12, max_chunk_tokens=8, max_running=4))
    short = Request("short", [1, 2], ROOT, SamplingParams(max_tokens=20))
    scheduler.add(short)
    run_step(scheduler)
    scheduler.add(Request("long", [3] * 60, ROOT, SamplingParams(max_tokens=1)))
    for _ in range(5):
        before = short.num_output_tokens
        run_step(scheduler)
        assert short.num_output_tokens == before + 1


def test_stronger_requests_are_admitted_first() -> None:
    scheduler = Scheduler(BlockPool(64, BLOCK), SchedulerConfig(max_batch_tokens=8, max_running=1))
    for name, priority in (("later", 5), ("sooner", 0)):
        scheduler.add(Request(name, [1, 2, 3], ROOT, SamplingParams(max_tokens=2), priority=priority))
    assert [c.request.request_id for c in scheduler.schedule()] == ["sooner"]
