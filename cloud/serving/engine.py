"""The engine: scheduler, runner and blocks put together, one step at a time, in one thread.

Owns the order add -> schedule -> run -> complete. It has no thread and no clock of its own; `engine_thread` drives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cloud.serving.backend import Embedding, SampledToken
from cloud.serving.block_pool import BlockPool, chain_root
from cloud.serving.cpu_threads import ThreadPlan
from cloud.serving.guide import Guides
from cloud.serving.kv_pool import KvLayout, KvPool
from cloud.serving.packed_linear import BITS
from cloud.serving.pooler import DEFAULT_POOLING, read_pooling
from cloud.serving.request import FinishReason, Pooling, Request
from cloud.serving.runner import EagerRunner, Runner
from cloud.serving.scheduler import Scheduler, SchedulerConfig
from cloud.serving.torch_backend import TorchBackend
from cloud.serving.weights import load_config, load_decoder, model_digest
from wire.errors import InvalidInputError

_DTYPES = ("float32", "bfloat16")
DEFAULT_POOL_BYTES = 1 << 30
GPU_POOL_SHARE = 0.8


@dataclass(frozen=True)
class EngineConfig:
    """How to build an engine. `dtype` "auto" is float32 on CPU: exact, and fast enough for small models."""

    model: Path
    dtype: str = "auto"
    num_blocks: int = 0  # 0: as many as fit DEFAULT_POOL_BYTES, on a GPU in GPU_POOL_SHARE of its free memory
    block_size: int = 16  # on a GPU 64 is faster: whole tiles of prefill
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    device: str = "cpu"  # or "cuda"
    weight_bits: int = 16  # 8 or 4: weights of products are rounded to that many bits when they are loaded


@dataclass(frozen=True)
class StepEvent:
    """What a step did for one request: a token, an embedding, blocks for a receiver, or the end. Safe in any thread."""

    request_id: str
    token: SampledToken | None
    finish_reason: FinishReason | None
    num_cached_tokens: int
    blocks: tuple[tuple[int, int], ...] = ()  # (index, block) of a prefill-only request, to be unparked when sent
    embedding: Embedding | None = None


class Engine:
    """Everything one worker needs to turn tokens into tokens."""

    guides: Guides | None = None  # set where the model's tokenizer is known
    pooling: Pooling = DEFAULT_POOLING  # of this model's embeddings
    embedding_size: int = 0
    threads: ThreadPlan | None = None  # of steps on a CPU; None leaves them to torch

    def __init__(self, runner: Runner, scheduler: Scheduler, kv: KvPool, fingerprint: str, vocab_size: int) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.kv = kv
        self.fingerprint = fingerprint
        self.vocab_size = vocab_size
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self.num_output_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return self.scheduler.has_work

    @property
    def pool(self) -> BlockPool:
        """The book-keeping of the KV blocks."""
        return self.scheduler.pool

    def root(self, salt: bytes) -> bytes:
        """Start of the block hashes of a tenant with this salt."""
        return chain_root(self.fingerprint, salt)

    def step(self) -> list[StepEvent]:
        """Run one batch. Returns one event per request that took part; empty when nothing could run."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        if self.threads is not None:
            _use_threads(self.threads.of(chunk.num_tokens for chunk in chunks))
        results = self.runner.run(chunks)
        tokens = [result if isinstance(result, SampledToken) else None for result in results]
        parked = self.scheduler.complete(chunks, [token.token_id if token else None for token in tokens])
        self.num_steps += 1
        self.num_output_tokens += sum(1 for token in tokens if token)
        self.num_prefill_tokens += sum(
            chunk.num_tokens for chunk in chunks if chunk.start < chunk.request.num_prompt_tokens
        )
        return [
            StepEvent(
                chunk.request.request_id,
                token,
                chunk.request.finish_reason,
                chunk.request.num_cached_tokens or 0,
                tuple(parked.get(chunk.request.request_id, ())),
                result if isinstance(result, Embedding) else None,
            )
            for chunk, token, result in zip(chunks, tokens, results, strict=True)
        ]

    def embed(self, requests: Sequence[Request]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Run these requests with `pooling`; their vectors, float32 [hidden] of length 1. For tests and benchmarks."""
        found: dict[str, Any] = {}
        for request in requests:
            self.scheduler.add(request)
        while any(request.request_id not in found for request in requests):
            before = self.num_steps
            events = self.step()
            if not events and self.num_steps == before:
                raise InvalidInputError("the engine cannot make progress", remedy="give it more KV blocks")
            found |= {event.request_id: event.embedding.vector for event in events if event.embedding is not None}
        return [found[request.request_id] for request in requests]

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Run these requests to the end and return their outputs. For tests and benchmarks."""
        for request in requests:
            self.scheduler.add(request)
        while any(request.finish_reason is None for request in requests):
            if not self.step():
                raise InvalidInputError("the engine cannot make progress", remedy="give it more KV blocks")
        return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def build_engine(config: EngineConfig) -> Engine:
    """Load the model, lay out the KV pool, and on a GPU compile the kernels and capture the graphs."""
    is_gpu = config.device == "cuda"
    if config.device not in ("cpu", "cuda") or (is_gpu and not torch.cuda.is_available()):
        raise InvalidInputError(f"device {config.device!r} is not available", remedy="use cpu")
    if config.weight_bits not in (16, *BITS):
        raise InvalidInputError(f"weight_bits is {config.weight_bits}", remedy="use 16, 8 or 4", param="weight_bits")
    is_packed = config.weight_bits != 16
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if is_gpu or is_packed else "float32"
    if dtype not in _DTYPES:
        raise InvalidInputError(f"dtype {config.dtype!r} is unknown", remedy=f"auto, {', '.join(_DTYPES)}")
    if is_packed and dtype != "bfloat16":
        raise InvalidInputError(f"{config.weight_bits}-bit weights with dtype {dtype}", remedy="use bfloat16 or auto")
    model, pooling = load_config(config.model), read_pooling(config.model)
    layout = KvLayout(model.num_layers, model.num_kv_heads, model.head_dim, config.block_size, dtype)
    max_context = min(config.scheduler.max_context_tokens, model.max_positions)
    limits = replace(config.scheduler, max_context_tokens=max_context)
    backend = _backend(config)
    decoder = load_decoder(config.model, model, backend, getattr(torch, dtype), max_context, config.device)
    num_blocks = config.num_blocks or max(1, _pool_bytes(is_gpu) // layout.bytes_per_block)
    scheduler = Scheduler(BlockPool(num_blocks, config.block_size), limits, model.eos_token_ids)
    kv = KvPool(layout, num_blocks, config.device)
    fingerprint = layout.fingerprint(_weights_digest(config))
    guides = Guides(config.model, model.vocab_size, model.eos_token_ids)
    if not is_gpu:
        engine = Engine(EagerRunner(decoder, kv), scheduler, kv, fingerprint, model.vocab_size)
        engine.guides, engine.pooling, engine.embedding_size = guides, pooling, model.hidden_size
        return engine
    from cloud.serving.cuda_engine import OverlappedEngine  # Triton is an extra
    from cloud.serving.cuda_runner import CudaConfig, CudaRunner

    runner = CudaRunner(decoder, kv, CudaConfig(limits.max_running, max_context))
    runner.capture()
    overlapped = OverlappedEngine(runner, scheduler, kv, fingerprint, model.vocab_size)
    overlapped.guides, overlapped.pooling, overlapped.embedding_size = guides, pooling, model.hidden_size
    return overlapped


def _use_threads(num_threads: int) -> None:
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


def _backend(config: EngineConfig) -> TorchBackend:
    if config.device == "cpu":
        return TorchBackend(weight_bits=config.weight_bits)
    from cloud.serving.cuda_backend import CudaBackend  # Triton is an extra

    return CudaBackend(weight_bits=config.weight_bits)


def _weights_digest(config: EngineConfig) -> str:
    """Names the weights as they are used: rounded ones give other keys and values."""
    digest = model_digest(config.model)
    return digest if config.weight_bits == 16 else f"{digest}-{config.weight_bits}"


def _pool_bytes(is_gpu: bool) -> int:
    return int(torch.cuda.mem_get_info()[0] * GPU_POOL_SHARE) if is_gpu else DEFAULT_POOL_BYTES
