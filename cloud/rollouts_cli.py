"""`foreshore rollouts`: make, watch and steer rollouts."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import typer

from cloud.fleet_command import MAX_ITEMS, add_group, command, field, items, part, table
from cloud.rollout_text import parse_pace, parse_waves, parse_window
from model_registry.client import ControlClient
from wire.errors import GateFailedError, InvalidInputError, TimedOutError

ENDS = frozenset({"succeeded", "halted", "rolled_back"})
POLL_S = 1.0

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
rollouts_app = add_group(
    app, "rollouts", "Start, watch and steer rollouts. Example: foreshore rollouts create vision --watch"
)


def _progress(rollout: dict[str, Any]) -> str:
    counts = rollout.get("counts") or {}
    return f"{counts.get('succeeded', 0)}/{rollout.get('num_devices', 0)}"


_ROLLOUTS = table(
    ("rollout", field("rollout_id")),
    ("model", lambda row: f"{row.get('model')} {row.get('version')}"),
    ("state", field("status")),
    ("group", field("group")),
    ("done", _progress),
    ("reason", field("reason")),
    empty="no rollouts; start one: foreshore rollouts create MODEL",
)


def _show_rollout(document: Any) -> None:
    _ROLLOUTS([document])
    if document.get("devices"):
        typer.echo("")
        table(
            ("wave", field("wave")), ("device", field("device_id")), ("outcome", field("state")),
            ("phase", field("phase")), ("reason", field("reason")), empty="",
        )(document["devices"])  # fmt: skip


@command(rollouts_app, "list", _ROLLOUTS)
def rollouts_list(client: ControlClient) -> Any:
    """List the rollouts, newest first."""
    return client.get("rollouts")


@command(rollouts_app, "show", _show_rollout)
def rollouts_show(client: ControlClient, rollout_id: str) -> Any:
    """Show one rollout with its devices."""
    return client.get(f"rollouts/{part(rollout_id)}")


@command(rollouts_app, "create", _show_rollout)
def rollouts_create(
    client: ControlClient,
    release: Annotated[str, typer.Argument(help="A release's digest, or MODEL (newest), or MODEL@VERSION.")],
    group: Annotated[str, typer.Option(help="Which devices.")] = "all",
    waves: Annotated[str, typer.Option(help="Counts and percentages; the first is the canary.")] = "1,100%",
    max_failures: Annotated[int, typer.Option(help="Failures allowed over all waves.")] = 0,
    min_success_ratio: Annotated[float, typer.Option(help="Share of successes needed in each wave.")] = 1.0,
    min_settled_ratio: Annotated[float, typer.Option(help="Share with an outcome before the next wave.")] = 1.0,
    pace: Annotated[str, typer.Option(help="10/min, or growing: '10/min x2 every 50 max 200'.")] = "",
    window: Annotated[str, typer.Option(help="When devices may switch, UTC: '02:00-04:00 sat,sun'.")] = "",
    approval: Annotated[str | None, typer.Option(help="Another person with this role must approve first.")] = None,
    joins: Annotated[bool, typer.Option("--joins", help="Devices that come later get it too.")] = False,
    soak_s: Annotated[float, typer.Option(help="Seconds a device watches the new version.")] = 0.0,
    device_timeout_s: Annotated[float, typer.Option(help="A device silent for this long has failed.")] = 600.0,
    start: Annotated[bool, typer.Option(help="Start at once (or once approved).")] = True,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for the end; exit 5 when it halts.")] = False,
    timeout_s: Annotated[float, typer.Option(help="With --watch: wait at most this long.")] = 3600.0,
) -> Any:
    """Roll a release out, wave by wave."""
    order = {
        "group": group, "waves": parse_waves(waves), "pace": parse_pace(pace), "window": parse_window(window),
        "gate": {
            "max_failures": max_failures, "min_success_ratio": min_success_ratio,
            "min_settled_ratio": min_settled_ratio,
        },
        "approval": approval, "joins": joins, "soak_s": soak_s, "device_timeout_s": device_timeout_s, "start": start,
    }  # fmt: skip
    created = client.post("rollouts", {"release": _find_release(client, release), **order})
    return _watch(client, created["rollout_id"], timeout_s) if watch else created


@command(rollouts_app, "watch", _show_rollout)
def rollouts_watch(
    client: ControlClient,
    rollout_id: str,
    timeout_s: Annotated[float, typer.Option(help="Wait at most this long.")] = 3600.0,
) -> Any:
    """Wait for a rollout's end; exit 5 when it halts."""
    return _watch(client, rollout_id, timeout_s)


def _steering(action: str, help_text: str) -> None:
    def steer(
        client: ControlClient,
        rollout_id: str,
        reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    ) -> Any:
        return client.post(f"rollouts/{part(rollout_id)}/{action}", {"reason": reason})

    steer.__doc__ = help_text
    command(rollouts_app, action, _show_rollout)(steer)


_steering("approve", "Agree to a rollout that somebody else made.")
_steering("start", "Start a rollout.")
_steering("pause", "Make no new offers; what is offered goes on.")
_steering("resume", "Go on with a paused rollout.")
_steering("halt", "Stop a rollout for good.")
_steering("retry", "Have the devices that failed, and only those, try again.")
_steering("rollback", "Take the release off every device that got it.")


def _watch(client: ControlClient, rollout_id: str, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        document = client.get(f"rollouts/{part(rollout_id)}")
        if document["status"] in ENDS:
            break
        if time.monotonic() > deadline:
            raise TimedOutError(f"rollout {rollout_id} is {document['status']} after {timeout_s:g} s", remedy="go on: "
                                f"foreshore rollouts watch {rollout_id}")  # fmt: skip
        time.sleep(POLL_S)
    if document["status"] == "halted":
        raise GateFailedError(f"rollout {rollout_id} halted: {document.get('reason')}", remedy="see its devices")
    return document


def _find_release(client: ControlClient, text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text
    name, _, version = text.partition("@")
    found = [r for r in items(client.get("releases", limit=MAX_ITEMS)) if r["name"] == name]
    found = [r for r in found if not version or r["version"] == version]
    if not found:
        raise InvalidInputError(f"there is no release {text!r}", remedy="see: foreshore models")
    newest = max(found, key=lambda release: int(release.get("sequence", 0)))
    return str(newest.get("release") or newest["digest"])
