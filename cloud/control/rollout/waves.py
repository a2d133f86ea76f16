"""Cuts devices into waves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wire.errors import InvalidInputError

MAX_WAVES = 50


def plan_waves(device_ids: Sequence[str], waves: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Cut the devices, in their order, into waves.

    `{"count": n}` takes the next n; `{"percent": p}` takes what is needed so that p percent of all are reached. Who is
    left forms a last wave; empty waves vanish. Without waves everybody is one wave.
    """
    if len(waves) > MAX_WAVES:
        raise InvalidInputError(f"{len(waves)} waves are too many", remedy=f"at most {MAX_WAVES}")
    planned, taken = list[list[str]](), 0
    for wave in waves:
        if len(wave) != 1 or not set(wave) <= {"count", "percent"}:
            raise InvalidInputError(f"wave {dict(wave)} is not understood", remedy='{"count": 1} or {"percent": 50}')
        amount = next(iter(wave.values()))
        if amount <= 0 or ("percent" in wave and amount > 100):
            raise InvalidInputError(f"wave {dict(wave)} is out of range", remedy="a count from 1, a percentage to 100")
        goal = taken + int(amount) if "count" in wave else -int(-len(device_ids) * amount // 100)
        goal = min(max(goal, taken), len(device_ids))
        planned.append(list(device_ids[taken:goal]))
        taken = goal
    planned.append(list(device_ids[taken:]))
    return [wave for wave in planned if wave]
