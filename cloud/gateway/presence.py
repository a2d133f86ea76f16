"""Whether the client of a request is still there: nobody computes for one that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from wire.errors import UnavailableError

T = TypeVar("T")
_WATCH_S = 0.25


async def wait_until_gone(request: Request) -> None:
    """Return when the client has left."""
    while not await request.is_disconnected():  # noqa: ASYNC110 - ASGI offers a question only
        await asyncio.sleep(_WATCH_S)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; then raises `UnavailableError`."""
    tasks = asyncio.create_task(work, name="work"), asyncio.create_task(wait_until_gone(request), name="watch client")
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise UnavailableError("the client has gone", remedy="")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
