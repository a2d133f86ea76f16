"""A request as the engine sees it: tokens in, tokens out, and where its keys and values live.

Owns the sampling parameters' limits and the life of one sequence. Everything here is plain Python: no torch, no clock.
A resumed request (its first worker died) starts with the tokens already emitted; `num_prompt_tokens` says where the
output begins, so penalties, seeds and length limits continue as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from cloud.serving.block_pool import hash_block
from wire.errors import InvalidInputError

if TYPE_CHECKING:
    from cloud.serving.guide import Guide

MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    PREFILLED = "prefilled"
    EMBEDDED = "embedded"


class Pooling(StrEnum):
    """How the last hidden states of a prompt become one vector: their mean, or the one of the last token."""

    MEAN = "mean"
    LAST = "last"


class State(StrEnum):
    """Where a request is: in the queue, in the batch, done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off.

    The draw for output token `i` depends on `seed` and `i` alone, so another worker continues a sequence exactly.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    num_logprobs: int | None = None  # None: no log probabilities; 0: the chosen token's only
    json_schema: str = ""  # the answer must be a document of it; its request needs a guide

    def __post_init__(self) -> None:
        for name, low, high in _LIMITS:
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidInputError(f"{name} is {value}", remedy=f"use {low} to {high}", param=name)
        if self.top_p <= 0:
            raise InvalidInputError("top_p is 0", remedy="use a value above 0, up to 1", param="top_p")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise InvalidInputError(
                f"logprobs is {self.num_logprobs}", remedy=f"use 0 to {MAX_LOGPROBS}", param="logprobs"
            )
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidInputError(
                f"{len(self.stop_token_ids)} stop tokens", remedy=f"use at most {MAX_STOP_TOKENS}", param="stop"
            )

    @property
    def is_plain_greedy(self) -> bool:
        """True when the next token is simply the largest logit."""
        return self.temperature == 0 and not self.has_penalties and not self.needs_host_logits

    @property
    def needs_host_logits(self) -> bool:
        """True when a draw depends on, or tells, more than a kernel knows: a schema, log probabilities."""
        return self.num_logprobs is not None or bool(self.json_schema)

    @property
    def has_penalties(self) -> bool:
        """True when earlier tokens change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 1 << 20),
    ("temperature", 0.0, 2.0),
    ("top_k", 0, 1 << 20),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.1, 10.0),
    ("seed", 0, (1 << 63) - 1),
)


@dataclass(eq=False)
class Request:
    """One sequence. The scheduler moves it, the runner reads it; nobody else changes it.

    `chain_root` is what the first block's hash starts from: the model and the tenant's salt (`block_pool.chain_root`).
    A prefill-only request computes whole blocks for another worker and emits no token; one with `pooling` emits one
    vector and no token.
    """

    request_id: str
    token_ids: list[int]
    chain_root: bytes
    params: SamplingParams = field(default_factory=SamplingParams)
    num_prompt_tokens: int = -1  # set to len(token_ids) when not given
    priority: int = 0  # lower runs first
    is_prefill_only: bool = False
    pooling: Pooling | None = None
    guide: Guide | None = None

    # the scheduler's book-keeping
    state: State = State.WAITING
    arrival: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # tokens found in the prefix cache at first admission; None before it
    num_preemptions: int = 0
    num_sealed_blocks: int = 0
    num_parked_blocks: int = 0  # full blocks already given to the sender of a hand-off
    block_ids: list[int] = field(default_factory=list)
    held_block_ids: list[int] = field(default_factory=list)  # received from a prefill worker, kept until admission
    block_hashes: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InvalidInputError("the prompt has no tokens", remedy="send at least one token", param="prompt")
        if self.num_prompt_tokens < 0:
            self.num_prompt_tokens = len(self.token_ids)

    @property
    def is_generating(self) -> bool:
        """Whether tokens are drawn: the prompt is not all."""
        return not self.is_prefill_only and self.pooling is None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Strength in the queue and against preemption: smaller goes first."""
        return (self.priority, self.arrival)

    def hashes(self, block_size: int) -> Iterator[bytes]:
        """Hashes of the full blocks of the tokens so far, in order, each computed when it is first asked for."""
        for index in range(len(self.token_ids) // block_size):
            if index == len(self.block_hashes):
                parent = self.block_hashes[-1] if self.block_hashes else self.chain_root
                tokens = self.token_ids[index * block_size : (index + 1) * block_size]
                self.block_hashes.append(hash_block(parent, tokens))
            yield self.block_hashes[index]
