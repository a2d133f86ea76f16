"""Rolls a release out and shows each device's way, as a live table on a terminal or as lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cloud.demo.platform import Platform
from model_registry.client import ControlClient
from wire.errors import ConflictError, NotFoundError, TimedOutError

ROLLOUT_TIMEOUT_S = 240.0
DEVICE_TIMEOUT_S = 180.0
POLL_S = 0.5
ENDED = ("succeeded", "halted", "rolled_back")


@dataclass(frozen=True)
class Row:
    """One device in a rollout, as a person sees it. Sizes in bytes, of this update alone."""

    device_id: str
    wave: int | None
    state: str
    phase: str
    wire_bytes: int
    encoding: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """How a rollout ended."""

    rollout: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def status(self) -> str:
        """`succeeded`, `halted` or `rolled_back`."""
        return str(self.rollout["status"])

    @property
    def wire_bytes(self) -> int:
        """What all devices received."""
        return sum(row.wire_bytes for row in self.rows)


class Rollouts:
    """Starts rollouts on one platform and watches them."""

    def __init__(self, platform: Platform, console: Console) -> None:
        self._platform = platform
        self._console = console

    def run(self, release: Mapping[str, Any], device_ids: Sequence[str]) -> Outcome:
        """Canary first, then everybody; returns when the rollout has ended."""
        group = f"{release['name']}-devices"
        self._platform.control(lambda client: _make_group(client, group, device_ids))
        rollout_id = str(self._platform.control(lambda client: _start(client, release, group))["rollout_id"])
        deadline, shown = time.monotonic() + ROLLOUT_TIMEOUT_S, list[Row]()
        with Live(console=self._console, auto_refresh=False) as live:
            while True:
                rollout = self._platform.control(lambda client: dict(client.get(f"/rollouts/{rollout_id}")))
                rows = self._platform.control(lambda client: _rows(client, rollout))  # noqa: B023 - called at once
                if rows != shown:
                    self._show(live, rollout, rows)
                    shown = rows
                if rollout["status"] in ENDED:
                    return Outcome(rollout, rows)
                if time.monotonic() > deadline:
                    raise TimedOutError(f"rollout {rollout_id} is still {rollout['status']}", remedy="see its page")
                time.sleep(POLL_S)

    def _show(self, live: Live, rollout: Mapping[str, Any], rows: Sequence[Row]) -> None:
        if self._console.is_terminal:
            live.update(table(rollout, rows), refresh=True)
        else:
            states = ", ".join(f"{row.device_id} {row.phase or row.state}" for row in rows)
            self._console.print(f"    {rollout['status']}: {states}", highlight=False, soft_wrap=True)


def table(rollout: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """The devices of a rollout, one a line."""
    title = f"{rollout['model']} {rollout['version']}: {rollout['status']}"
    shown = Table(title=title, title_justify="left")
    for column in ("device", "wave", "state", "phase", "received", "as", "why"):
        shown.add_column(column, justify="right" if column in {"wave", "received"} else "left")
    for row in rows:
        received = f"{row.wire_bytes / 1e6:.1f} MB" if row.wire_bytes else ""
        shown.add_row(row.device_id, str(row.wave or ""), row.state, row.phase, received, row.encoding, row.reason[:80])
    return shown


def _make_group(client: ControlClient, name: str, device_ids: Sequence[str]) -> None:
    try:
        client.put(f"/groups/{name}", {"device_ids": list(device_ids)})
    except NotFoundError:
        client.post("/groups", {"name": name, "device_ids": list(device_ids)})


def _start(client: ControlClient, release: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Start the rollout; one that an interrupted try has already started is taken instead."""
    body = {"release": release["release"], "group": group, "waves": [{"count": 1}, {"percent": 100}]}
    body |= {"gate": {"max_failures": 0, "min_success_ratio": 1.0}, "soak_s": 1.0, "start": True}
    body |= {"device_timeout_s": DEVICE_TIMEOUT_S}
    try:
        return dict(client.post("/rollouts", body))
    except ConflictError:
        found = [one for one in client.get("/rollouts")["items"] if one["release"] == release["release"]]
        if not found:
            raise
        return dict(found[0])


def _rows(client: ControlClient, rollout: Mapping[str, Any]) -> list[Row]:
    devices = {device["device_id"]: device for device in client.get("/devices")["items"]}
    return [_row(slot, devices.get(slot["device_id"], {}), rollout) for slot in rollout["devices"]]


def _row(slot: Mapping[str, Any], device: Mapping[str, Any], rollout: Mapping[str, Any]) -> Row:
    models = [model for model in device.get("models", []) if model["name"] == rollout["model"]]
    mine: Mapping[str, Any] = next((model for model in models if model.get("rollout_id") == rollout["rollout_id"]), {})
    return Row(
        device_id=str(slot["device_id"]),
        wave=slot["wave"],
        state=str(slot["state"]),
        phase=str(slot["phase"] or ""),
        wire_bytes=int(mine.get("wire_bytes") or 0),
        encoding=str(mine.get("encoding") or ""),
        reason=str(slot["reason"] or ""),
    )
