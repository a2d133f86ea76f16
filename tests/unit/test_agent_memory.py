"""Memory that language models take on a device: what streams reserve, what the budget leaves, what a trial counts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.cache_shares import share_cache
from edge_agent.config import Profile
from edge_agent.engines import Engine, Engines
from edge_agent.offload import Request, Situation, choose
from edge_agent.runtimes.base import Array, Piece, Sampling
from edge_agent.runtimes.language_loop import LanguageLoop, Stream
from edge_agent.state import Slot
from edge_agent.trial import try_out
from model_registry.manifest import ArtefactFile, Chunk, Golden, Kind, Manifest, Requirements, sha256
from tests.fakes.agent_plane import golden_bytes, tiny_model
from wire.errors import InsufficientSpaceError

WAIT_S = 60
MIB = 1 << 20


@given(st.integers(-100, 10_000), st.lists(st.integers(1, 1000), min_size=1, max_size=5))
def test_shares_stay_within_what_is_free_and_a_whole_context_comes_first(free: int, contexts: list[int]) -> None:
    shares = share_cache(free, contexts)
    assert sum(shares) <= max(0, free)
    if sum(contexts) <= free:
        assert all(share >= context for share, context in zip(shares, contexts, strict=True))
    assert share_cache(free, []) == []


class CountingGraph:
    """A decoder without weights that knows the most tokens it ever held."""

    num_rows, token_bytes, has_hidden_states = 5, 1, False

    def __init__(self) -> None:
        self.held = [0] * self.num_rows
        self.most_tokens = self.most_rows = 0

    def prefill(self, row: int, tokens: Sequence[int], num_past: int, stop: Any = None) -> None:
        self.score(row, tokens, num_past)

    def score(self, row: int, tokens: Sequence[int], num_past: int) -> Array:
        self.held[row] = num_past + len(tokens)
        self.most_tokens = max(self.most_tokens, sum(self.held))
        return np.eye(8, dtype=np.float32)[[5] * len(tokens)]

    def decode(self, tokens: Sequence[int], num_past: Sequence[int]) -> Array:
        self.most_rows = max(self.most_rows, len(tokens))
        return np.concatenate([self.score(row, [5], past) for row, past in enumerate(num_past)])

    def hidden(self, row: int, tokens: Sequence[int]) -> Array:
        raise NotImplementedError

    def move(self, source: int, target: int, num_tokens: int) -> None:
        self.held[target], self.held[source] = self.held[source], 0

    def free(self, row: int) -> None:
        self.held[row] = 0


class Silent:
    """Tokens without text."""

    def decode(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def run_together(graph: CountingGraph, max_cached_tokens: int, sizes: list[tuple[int, int]]) -> list[str | None]:
    """How each stream of (prompt, answer) tokens ended."""
    loop = LanguageLoop(graph, frozenset(), "test")
    loop.max_cached_tokens = max_cached_tokens
    ends: list[str | None] = []
    done = threading.Semaphore(0)

    def deliver(piece: Piece | Exception) -> None:
        if isinstance(piece, Exception) or piece.finish_reason is not None:
            ends.append("error" if isinstance(piece, Exception) else piece.finish_reason)
            done.release()

    for prompt, answer in sizes:
        loop.submit(Stream([1] * prompt, Sampling(answer), deliver, Silent()))
    for _ in sizes:
        assert done.acquire(timeout=WAIT_S)
    loop.close()
    return ends


def test_streams_wait_until_they_fit_into_the_cache_beside_those_that_run() -> None:
    graph = CountingGraph()
    assert run_together(graph, 250, [(40, 60)] * 6) == ["length"] * 6
    assert (graph.most_rows, graph.most_tokens <= 250) == (2, True)
    graph = CountingGraph()
    run_together(graph, 10_000, [(40, 60)] * 6)
    assert graph.most_rows == 4


def test_a_stream_alone_always_runs() -> None:
    assert run_together(CountingGraph(), 10, [(40, 20), (40, 20)]) == ["length", "length"]


def manifest_of(name: str, kind: Kind, contents: dict[str, bytes]) -> Manifest:
    """Of files that need a MiB of memory, as somebody states."""
    files = [
        ArtefactFile(
            path=path,
            size_bytes=len(data),
            digest=sha256(data),
            chunks=[Chunk(digest=sha256(data), size_bytes=len(data))],
        )
        for path, data in contents.items()
    ]
    golden = Golden(path="golden.npz", num_cases=1, max_abs_error=1e-4) if "golden.npz" in contents else None
    return Manifest(
        name=name,
        kind=kind,
        target="cpu-x86",
        runtime="onnxruntime",
        precision="fp32",
        files=files,
        entry="model.onnx",
        requires=Requirements(memory_bytes=MIB),
        golden=golden,
        source_digest="0" * 64,
    )


class BoundedLanguage:
    """A language runtime of which only the cache counts."""

    name, providers, cache_token_bytes, max_context_tokens = "bounded", ["CPU"], MIB, 100

    def __init__(self) -> None:
        self.context_tokens, self.limit = self.max_context_tokens, 0

    def limit_cache(self, num_bytes: int) -> None:
        self.limit = num_bytes // MIB
        self.context_tokens = min(self.max_context_tokens, self.limit)

    def close(self) -> None:
        pass


def loaded(name: str, measured_mib: int) -> Engine:
    manifest = manifest_of(name, "language", {"model.onnx": b"x"})
    return Engine(Slot(manifest.digest, "1.0.0", "r"), manifest, BoundedLanguage(), measured_mib * MIB)  # type: ignore[arg-type]


def test_caches_get_what_the_weights_leave_and_give_way_to_another_model() -> None:
    async def scenario() -> None:
        engines = Engines(1000 * MIB)
        first, second = loaded("one", 300), loaded("two", 200)
        engines.add(first)
        assert first.runtime.limit == 700  # type: ignore[union-attr]
        assert engines.used_bytes == 400 * MIB
        engines.add(second)
        assert [engine.runtime.limit for engine in (first, second)] == [250, 250]  # type: ignore[union-attr]
        engines.retire(second)
        assert first.runtime.limit == 700  # type: ignore[union-attr]

    asyncio.run(scenario())


def test_a_tight_budget_shortens_the_context_and_one_that_holds_none_refuses_the_model() -> None:
    engines = Engines(370 * MIB)
    engine = loaded("one", 300)
    engines.add(engine)
    engine.check_context()
    situation = Situation(
        model_is_here=True,
        context_tokens=engine.runtime.context_tokens,  # type: ignore[union-attr]
        model_context_tokens=100,
        has_gateway=True,
        cloud_is_reachable=True,
    )
    decision = choose(Request("one", 60, 20), situation, decision_id="d", now=datetime(2026, 1, 1, tzinfo=UTC))
    assert decision.chosen == "cloud"
    assert "80 tokens exceed the device's context of 70 (its memory budget holds no more, the model has 100)" in str(
        decision.reason
    )
    tight = loaded("two", 340)
    Engines(370 * MIB).add(tight)
    with pytest.raises(InsufficientSpaceError, match="memory for 30 tokens"):
        tight.check_context()


def test_what_a_trial_held_before_it_loaded_anything_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("ballast = bytearray(b'x') * (300 << 20)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    contents = {"model.onnx": tiny_model(2.0), "golden.npz": golden_bytes(2.0)}
    for path, data in contents.items():
        (tmp_path / path).write_bytes(data)
    (tmp_path / "manifest.json").write_bytes(manifest_of("tiny", "tensor", contents).to_bytes())
    profile = Profile(name="test", targets=["cpu-x86"], memory_budget_bytes=1 << 30)

    def tried(free_bytes: int) -> int:
        asked = try_out(tmp_path / "manifest.json", tmp_path, profile, free_bytes=free_bytes, timeout_s=WAIT_S)
        return asyncio.run(asked)

    assert tried(100 * MIB) < 100 * MIB
    with pytest.raises(InsufficientSpaceError):
        tried(10 << 10)


FILL = """
import os, threading
from edge_agent import thrift
from edge_agent.trial import resident_bytes
assert thrift.use_one_heap()
def fill():
    large = bytearray(b'x') * (30 << 20)  # glibc keeps twice as much from now on
    del large
    blocks = [bytearray(b'x') * 100_000 for _ in range(500)]
    del blocks
    filled.set()
    ended.wait(30)
filled, ended = threading.Event(), threading.Event()
thread = threading.Thread(target=fill)
before = resident_bytes(os.getpid())
thread.start(); filled.wait(30)
thrift.give_back()
print(resident_bytes(os.getpid()) - before)
ended.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's help is Linux only")
def test_what_a_thread_freed_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert int(done.stdout) < 10 * MIB  # without it 37
