"""How much memory the keys and values of each language model may take, purely: what the weights leave of the budget.

Each model gets one full context first, all of them less in proportion where that is too much; what is left then is
shared evenly, for more streams at once.
"""

from __future__ import annotations

from collections.abc import Sequence


def share_cache(free_bytes: int, context_bytes: Sequence[int]) -> list[int]:
    """Bytes for each model, given what one full context of each takes; together at most `free_bytes`."""
    free_bytes, first_bytes = max(0, free_bytes), sum(context_bytes)
    if first_bytes > free_bytes:
        return [free_bytes * one // first_bytes for one in context_bytes]
    return [one + (free_bytes - first_bytes) // len(context_bytes) for one in context_bytes]
