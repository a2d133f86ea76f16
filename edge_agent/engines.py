"""The loaded models: which one answers for a name, who still uses an old one, how much memory they count for.

`use` pins a model for one request: a switch lets it finish there, and an unloaded model is freed when the last
request leaves. Only touched from the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import psutil

from edge_agent.cache_shares import share_cache
from edge_agent.conduct import Conduct
from edge_agent.runtimes.base import LanguageRuntime, TensorRuntime
from edge_agent.state import Slot
from edge_agent.thrift import trim
from model_registry.manifest import Manifest
from wire.errors import InsufficientSpaceError, NotFoundError, OverloadedError

MIN_CONTEXT_TOKENS = 64


@dataclass
class Engine:
    """A loaded artefact and what it has been doing."""

    slot: Slot
    manifest: Manifest
    runtime: TensorRuntime | LanguageRuntime
    measured_bytes: int = 0  # by its trial; 0 when it had none
    latency_ms: float | None = None
    num_users: int = 0
    conduct: Conduct = field(default_factory=Conduct)
    is_retired: bool = False

    @property
    def memory_bytes(self) -> int:
        """What it counts for in the budget: the larger of what was stated and what was measured, with one context."""
        return max(memory_bytes(self.manifest), self.weights_bytes + self.context_bytes)

    @property
    def weights_bytes(self) -> int:
        """As measured, else what was stated, without a context."""
        return self.measured_bytes or max(self.manifest.size_bytes, memory_bytes(self.manifest) - self.context_bytes)

    @property
    def context_bytes(self) -> int:
        """Keys and values of one full context; 0 where there are none, or nobody knows."""
        language = self._language
        return language.cache_token_bytes * language.max_context_tokens if language is not None else 0

    def limit_cache(self, num_bytes: int) -> None:
        """Bound the keys and values of all its streams."""
        if self._language is not None:
            self._language.limit_cache(num_bytes)

    def check_context(self) -> None:
        """Raise `InsufficientSpaceError` where the budget leaves a language model no context worth the name."""
        language = self._language
        if language is None or language.context_tokens >= min(MIN_CONTEXT_TOKENS, language.max_context_tokens):
            return
        raise InsufficientSpaceError(
            f"beside its weights there is memory for {language.context_tokens} tokens",
            remedy="raise memory_budget_bytes or remove a model",
            needed_bytes=MIN_CONTEXT_TOKENS * language.cache_token_bytes,
            free_bytes=language.context_tokens * language.cache_token_bytes,
        )

    @property
    def _language(self) -> LanguageRuntime | None:
        return cast(LanguageRuntime, self.runtime) if self.manifest.kind == "language" else None


def memory_bytes(manifest: Manifest) -> int:
    """The stated requirement, or the file size and a quarter when none is stated."""
    return manifest.requires.memory_bytes or manifest.size_bytes * 5 // 4


def check_memory(needed_bytes: int, free_bytes: int) -> None:
    """Raise `InsufficientSpaceError` with both numbers when the first exceeds the second."""
    if needed_bytes > free_bytes:
        raise InsufficientSpaceError(
            f"the model needs {needed_bytes} bytes of memory and {free_bytes} are free",
            remedy="raise memory_budget_bytes or remove a model",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )


@dataclass
class Admission:
    """A bounded queue before `max_streams` places."""

    max_streams: int
    max_queue: int
    num_running: int = 0
    num_waiting: int = 0
    _free: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def is_full(self) -> bool:
        """Whether the next one would be refused."""
        return self.num_running >= self.max_streams and self.num_waiting >= self.max_queue

    @asynccontextmanager
    async def enter(self, timeout_s: float) -> AsyncIterator[None]:
        """Wait for a place; a full queue or a long wait raises `OverloadedError`."""
        if self.is_full:
            raise OverloadedError(f"{self.num_waiting} requests wait already", remedy="try again", retry_after_s=2)
        self.num_waiting += 1
        try:
            async with asyncio.timeout(timeout_s), self._free:
                await self._free.wait_for(lambda: self.num_running < self.max_streams)
                self.num_running += 1
        except TimeoutError as error:
            raise OverloadedError("the wait was too long", remedy="try again", retry_after_s=5) from error
        finally:
            self.num_waiting -= 1
        try:
            yield
        finally:
            self.num_running -= 1
            async with self._free:
                self._free.notify()


class Engines:
    """Active engines by model name, beside candidates that are being tried.

    Each language model may use what the budget leaves for keys and values (`cache_shares`): at least one context counts
    for it, more streams take what nobody else counts for, until another model comes.
    """

    def __init__(self, memory_budget_bytes: int) -> None:
        self._budget_bytes = memory_budget_bytes
        self._active: dict[str, Engine] = {}
        self._loaded: list[Engine] = []
        self._used_at = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Since a request last ended; 0 while one runs."""
        return 0.0 if any(engine.num_users for engine in self._loaded) else time.monotonic() - self._used_at

    @property
    def used_bytes(self) -> int:
        """Memory that loaded models count for."""
        return sum(engine.memory_bytes for engine in self._loaded)

    def active(self) -> dict[str, Engine]:
        """The engines that answer, by name."""
        return dict(self._active)

    def loaded(self) -> list[Engine]:
        """Every engine in memory, candidates and retired ones included."""
        return list(self._loaded)

    def find(self, name: str) -> Engine | None:
        """The engine that answers for `name`."""
        return self._active.get(name)

    def free_bytes(self, *, replacing: str | None = None) -> int:
        """Memory left for a model, of the budget and of the machine, when the engines of `replacing` go."""
        leaving = sum(engine.memory_bytes for engine in self._loaded if engine.manifest.name == replacing)
        return max(0, min(self._budget_bytes - self.used_bytes, psutil.virtual_memory().available) + leaving)

    def check_fits(self, manifest: Manifest, *, replacing: str | None = None) -> None:
        """Raise `InsufficientSpaceError` when `manifest` cannot be loaded beside the rest (without `replacing`)."""
        check_memory(memory_bytes(manifest), self.free_bytes(replacing=replacing))

    def add(self, engine: Engine) -> None:
        """Count a loaded engine."""
        self._loaded.append(engine)
        self._share_cache()

    def route(self, name: str, engine: Engine | None) -> Engine | None:
        """Let `engine` answer for `name` from now on; returns the one before."""
        before = self._active.pop(name, None)
        if engine is not None:
            self._active[name] = engine
        return before

    def retire(self, engine: Engine) -> None:
        """Free an engine when its last request has left."""
        engine.is_retired = True
        self._free_if_idle(engine)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """Pin the engine of `name` for one request; the caller tells its `conduct` how it went."""
        engine = self._active.get(name)
        if engine is None:
            raise NotFoundError(f"model {name!r} is not on this device", remedy=f"here are: {sorted(self._active)}")
        engine.num_users += 1
        try:
            yield engine
        finally:
            engine.num_users -= 1
            self._used_at = time.monotonic()
            self._free_if_idle(engine)

    def _free_if_idle(self, engine: Engine) -> None:
        if engine.is_retired and engine.num_users == 0 and engine in self._loaded:
            self._loaded.remove(engine)
            self._share_cache()
            asyncio.get_running_loop().run_in_executor(None, _unload, engine)  # takes its time

    def _share_cache(self) -> None:
        """What the weights leave of the budget is for keys and values."""
        cached = [engine for engine in self._loaded if engine.context_bytes]
        tensors = [engine for engine in self._loaded if not engine.context_bytes]
        used_bytes = sum(engine.weights_bytes for engine in cached) + sum(engine.memory_bytes for engine in tensors)
        shares = share_cache(self._budget_bytes - used_bytes, [engine.context_bytes for engine in cached])
        for engine, share in zip(cached, shares, strict=True):
            engine.limit_cache(share)


def _unload(engine: Engine) -> None:
    engine.runtime.close()
    trim()  # no collection: that would hold up the requests of the others
