"""Gives memory that was needed for a moment back to the system, so that an idle agent stays small.

glibc keeps what was freed for later; an agent is idle most of its life on a device with little memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc

_M_ARENA_MAX = -8  # mallopt's word
FIRST_S = 1.0
EVERY_S = 60.0


def use_one_heap() -> bool:
    """Have threads that start from now on share one heap, all of which `trim` can give back; False where the C library
    cannot. By itself glibc makes heaps for threads, and never gives the last free part of those back.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    return tune is not None and bool(tune(_M_ARENA_MAX, 1))


def trim() -> bool:
    """Return free pages to the system, in milliseconds; False where there were none, or the C library cannot."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return function is not None and bool(function(0))


def give_back() -> bool:
    """Collect garbage and `trim`."""
    gc.collect()
    return trim()


async def stay_small() -> None:
    """Give back soon after the start, then now and then."""
    wait_s = FIRST_S
    while True:
        await asyncio.sleep(wait_s)
        await asyncio.to_thread(give_back)
        wait_s = EVERY_S
