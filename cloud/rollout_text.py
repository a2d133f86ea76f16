"""How people write a rollout's waves, pace and window, in a terminal and in a form; each becomes the API's JSON.

Waves: `1, 50%, 100%`. Pace: `10/min`, or growing `10/min x2 every 50 max 200`. Window in UTC: `02:00-04:00`, or on
some days `22:00-04:00 mon,tue`.
"""

from __future__ import annotations

import re
from typing import Any

from wire.errors import InvalidInputError

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MIN = 24 * 60
_WAVE = re.compile(r"(\d{1,6})(%?)")
_NUMBER = r"(\d{1,7}(?:\.\d{1,3})?)"
_PACE = re.compile(rf"{_NUMBER}\s*/\s*min(?:\s+x\s*{_NUMBER}\s+every\s+(\d{{1,6}}))?(?:\s+max\s+{_NUMBER})?")
_WINDOW = re.compile(r"(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})(?:\s+([a-z, ]+))?")


def parse_waves(text: str) -> list[dict[str, int]]:
    """Waves: a plain number counts devices, a percentage is of the group; nothing means all at once."""
    waves = []
    for part in text.split(",") if text.strip() else ():
        match = _WAVE.fullmatch(part.strip())
        if match is None or int(match[1]) == 0 or (match[2] and int(match[1]) > 100):
            raise InvalidInputError(f"wave {part.strip()[:40]!r} is not understood", remedy="for example: 1, 50%, 100%")
        waves.append({"percent" if match[2] else "count": int(match[1])})
    return waves


def parse_pace(text: str) -> dict[str, Any] | None:
    """The pace; None for nothing."""
    if not text.strip():
        return None
    match = _PACE.fullmatch(text.strip().lower())
    if match is None:
        raise InvalidInputError(
            f"pace {text.strip()[:40]!r} is not understood",
            remedy="for example: 10/min, or 10/min x2 every 50 max 200",
        )
    per_minute, factor, every, most = match.groups()
    pace: dict[str, Any] = {"per_minute": float(per_minute)}
    if factor:
        pace |= {"factor": float(factor), "every": int(every)}
    return pace | ({"max_per_minute": float(most)} if most else {})


def parse_window(text: str) -> dict[str, Any] | None:
    """The maintenance window; None for nothing. One that ends before it begins reaches past midnight."""
    if not text.strip():
        return None
    match = _WINDOW.fullmatch(text.strip().lower())
    hint = "for example: 02:00-04:00, or 22:00-04:00 mon,tue (UTC)"
    if match is None:
        raise InvalidInputError(f"window {text.strip()[:40]!r} is not understood", remedy=hint)
    hours, minutes = (int(match[1]), int(match[3])), (int(match[2]), int(match[4]))
    days = [day.strip() for day in (match[5] or "").replace(" ", ",").split(",") if day.strip()]
    if any(hour > 23 for hour in hours) or any(minute > 59 for minute in minutes) or not set(days) <= set(WEEKDAYS):
        raise InvalidInputError(f"window {text.strip()[:40]!r} has no such time or day", remedy=hint)
    opens, closes = hours[0] * 60 + minutes[0], hours[1] * 60 + minutes[1]
    lasts = (closes - opens) % DAY_MIN or DAY_MIN
    return {"opens_s": opens * 60, "lasts_s": lasts * 60, "weekdays": sorted({WEEKDAYS.index(day) for day in days})}


def waves_text(waves: list[dict[str, Any]]) -> str:
    """The waves as people write them."""
    return ", ".join(f"{w['percent']:g}%" if "percent" in w else f"{w['count']:g}" for w in waves) or "all at once"


def pace_text(pace: dict[str, Any] | None) -> str:
    """The pace as people write it."""
    if not pace:
        return "as fast as it goes"
    grows = f" x{pace['factor']:g} every {pace['every']}" if pace.get("factor", 1) != 1 else ""
    is_bounded = grows and pace.get("max_per_minute", 1e6) < 1e6
    return f"{pace['per_minute']:g}/min{grows}" + (f" max {pace['max_per_minute']:g}" if is_bounded else "")


def window_text(window: dict[str, Any] | None) -> str:
    """The window as people write it."""
    if not window:
        return "at any time"
    opens = int(window["opens_s"]) // 60
    closes = (opens + int(window["lasts_s"]) // 60) % DAY_MIN
    days = ",".join(WEEKDAYS[day] for day in window.get("weekdays") or ())
    return f"{opens // 60:02}:{opens % 60:02}-{closes // 60:02}:{closes % 60:02} UTC" + (f" {days}" if days else "")
