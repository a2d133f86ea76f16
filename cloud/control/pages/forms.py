"""Reads forms: what a person typed becomes the API's JSON, or an error that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cloud.rollout_text import parse_pace, parse_waves, parse_window
from wire.errors import InvalidInputError


def rollout_order(form: Mapping[str, str]) -> dict[str, Any]:
    """The body of `POST /rollouts`."""
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
            "min_settled_ratio": _number(form, "min_settled_percent", "100") / 100,
        },
        "pace": parse_pace(form.get("pace", "")),
        "window": parse_window(form.get("window", "")),
        "approval": form.get("approval", "").strip() or None,
        "joins": form.get("joins") == "yes",
        "soak_s": _number(form, "soak_s", "0"),
        "device_timeout_s": _number(form, "device_timeout_s", "600"),
        "start": form.get("then", "start") == "start",
    }


def group_body(form: Mapping[str, str]) -> dict[str, Any]:
    """The body of `POST /groups`: a filter, or names."""
    names = [name for name in re.split(r"[\s,]+", form.get("devices", "")) if name]
    text = form.get("filter", "").strip()
    if bool(names) == bool(text):
        raise InvalidInputError("a group has either a filter or devices", remedy="fill in one of the two fields")
    return {"name": form.get("name", "").strip(), **({"filter": text} if text else {"device_ids": names})}


def labels_body(form: Mapping[str, str]) -> dict[str, Any]:
    """The body of `PUT /devices/{id}/labels`: one `name=value` per line or comma."""
    labels = {}
    for part in re.split(r"[\n,]+", form.get("labels", "")):
        name, mark, value = part.strip().partition("=")
        if part.strip() and not (mark and name.strip() and value.strip()):
            raise InvalidInputError(
                f"label {part.strip()[:40]!r} is not understood", remedy="for example: site=hamburg"
            )
        if part.strip():
            labels[name.strip()] = value.strip()
    return {"labels": labels}


def webhook_body(form: Mapping[str, str]) -> dict[str, Any]:
    """The body of `POST /webhooks`."""
    actions = [one for one in re.split(r"[\s,]+", form.get("actions", "")) if one]
    return {"url": form.get("url", "").strip(), "actions": actions or ["*"]}


def _number(form: Mapping[str, str], name: str, default: str) -> float:
    text = form.get(name, "").strip() or default
    if not re.fullmatch(r"\d{1,7}(\.\d{1,3})?", text):
        label = name.replace("_", " ")
        raise InvalidInputError(f"{label} is {text[:40]!r}", remedy="give a number that is not negative")
    return float(text)
