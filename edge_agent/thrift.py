"""Gives memory that was needed for a moment back to the system, so that an idle agent stays small.

glibc keeps what was freed for later; an agent is idle most of its life on a device with little memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc

FIRST_S = 1.0
EVERY_S = 60.0


def give_back() -> bool:
    """Collect garbage and return free pages to the system; False where the C library cannot."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


async def stay_small() -> None:
    """Give back soon after the start, then now and then."""
    wait_s = FIRST_S
    while True:
        await asyncio.sleep(wait_s)
        await asyncio.to_thread(give_back)
        wait_s = EVERY_S
