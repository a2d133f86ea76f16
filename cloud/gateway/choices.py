"""All choices of one request, merged into one bounded stream of pieces.

The first choice of a prompt starts alone; its siblings follow at its first token and find the prompt in the cache.
Closing ends every choice and aborts what still runs on the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from cloud.gateway.answers import Piece
from cloud.gateway.generation import Generation
from cloud.gateway.text import TextStream
from model_registry.chat_tokenizer import ChatTokenizer
from wire.errors import ForeshoreError, UnavailableError

_MAX_PENDING = 64


class Choices:
    """Runs several generations; `next` gives their pieces in the order they come."""

    def __init__(
        self, generations: Sequence[Generation], num_per_prompt: int, tokenizer: ChatTokenizer, stops: Sequence[str]
    ) -> None:
        self.generations = generations
        self._num_per_prompt = num_per_prompt
        self._tokenizer = tokenizer
        self._stops = stops
        self._pieces: asyncio.Queue[Piece | ForeshoreError] = asyncio.Queue(_MAX_PENDING)
        self._has_begun = [asyncio.Event() for _ in generations]
        self._num_open = len(generations)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin generating."""
        self._tasks = [
            asyncio.create_task(self._produce(index), name=f"choice {index}") for index in range(len(self.generations))
        ]

    async def next(self, timeout_s: float) -> Piece | None:
        """The next piece; None when all choices ended. Raises `TimeoutError` or the error of a choice."""
        if self._num_open == 0:
            return None
        async with asyncio.timeout(timeout_s):
            piece = await self._pieces.get()
        if isinstance(piece, ForeshoreError):
            raise piece
        self._num_open -= piece.finish_reason is not None
        return piece

    async def abandon(self) -> None:
        """The client is gone: end everything, and let whoever waits in `next` know."""
        await self.close()
        while not self._pieces.empty():
            self._pieces.get_nowait()
        self._pieces.put_nowait(UnavailableError("the client has gone", remedy=""))

    async def close(self) -> None:
        """End everything and wait until it has ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _produce(self, index: int) -> None:
        first = index - index % self._num_per_prompt
        try:
            if index != first:
                await self._has_begun[first].wait()
            async with aclosing(self._run(index)) as pieces:
                async for piece in pieces:
                    self._has_begun[index].set()
                    await self._pieces.put(piece)
        except ForeshoreError as error:
            await self._pieces.put(error)
        except Exception as error:  # noqa: BLE001 - the top of a task: the client's stream shows it
            await self._pieces.put(UnavailableError(f"the gateway failed: {error!r}", remedy="report this"))
        finally:
            self._has_begun[index].set()

    async def _run(self, index: int) -> AsyncGenerator[Piece, None]:
        text = TextStream(self._tokenizer, self._stops)
        held: list[Any] = []
        async with aclosing(self.generations[index].stream()) as events:
            async for event in events:
                if isinstance(event, str):
                    yield Piece(index, text.flush(), tuple(held), "stop" if text.is_stopped else event)
                    return
                held.append(event)
                new = text.push(event.token_id)
                if text.is_stopped:
                    yield Piece(index, new, tuple(held), "stop")
                    return
                if new:
                    yield Piece(index, new, tuple(held))
                    held = []
