"""Reads the rollout form: what a person typed becomes the API's rollout order, or an error that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from wire.errors import InvalidInputError

_WAVE = re.compile(r"(\d{1,6})(%?)")


def rollout_order(form: Mapping[str, str]) -> dict[str, Any]:
    """The body of `POST /rollouts`; it starts at once."""
    release = form.get("release", "").strip()
    if not release:
        raise InvalidInputError("no release is chosen", remedy="choose one; if there is none, publish a model first")
    return {
        "release": release,
        "group": form.get("group", "").strip() or "all",
        "waves": parse_waves(form.get("waves", "")),
        "gate": {
            "max_failures": int(_number(form, "max_failures", "0")),
            "min_success_ratio": _number(form, "min_success_percent", "100") / 100,
        },
        "soak_s": _number(form, "soak_s", "0"),
        "device_timeout_s": _number(form, "device_timeout_s", "600"),
        "start": True,
    }


def parse_waves(text: str) -> list[dict[str, int]]:
    """Waves such as `1, 50%, 100%`: a plain number counts devices, a percentage is of the group."""
    waves = []
    for part in (text or "1, 100%").split(","):
        match = _WAVE.fullmatch(part.strip())
        if match is None or int(match[1]) == 0 or (match[2] and int(match[1]) > 100):
            raise InvalidInputError(f"wave {part.strip()[:40]!r} is not understood", remedy="for example: 1, 50%, 100%")
        waves.append({"percent" if match[2] else "count": int(match[1])})
    return waves


def _number(form: Mapping[str, str], name: str, default: str) -> float:
    text = form.get(name, "").strip() or default
    if not re.fullmatch(r"\d{1,7}(\.\d{1,3})?", text):
        label = name.replace("_", " ")
        raise InvalidInputError(f"{label} is {text[:40]!r}", remedy="give a number that is not negative")
    return float(text)
