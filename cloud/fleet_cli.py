"""The commands that steer a fleet: login, devices, groups, rollouts, models, jobs, enrolments, tokens, decisions.

A command asks the API for one thing and prints it: a table for people, with `--json` the API's own document. Which
control plane, as whom: `model_registry.login`. A command without a verb lists.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from model_registry.client import ControlClient
from model_registry.login import ConnectionOptions, Login, find_login, read_token, save_login
from wire.errors import GateFailedError, InvalidInputError, TimedOutError

ENDS = frozenset({"succeeded", "halted", "rolled_back"})
POLL_S = 1.0
MAX_ITEMS = 500  # the API gives no more at once

Url = Annotated[str | None, typer.Option("--url", help="Control plane; else FORESHORE_URL, else the login.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the API token.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the API's JSON, for programs.")]
Show = Callable[[Any], None]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def _group(name: str, help_text: str) -> typer.Typer:
    group = typer.Typer(help=help_text, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


devices_app = _group("devices", "List, show and revoke devices. Example: foreshore devices show dock-camera-1")
groups_app = _group(
    "groups", "List and change groups. Example: foreshore groups create docks --filter 'profile=jetson*'"
)
rollouts_app = _group("rollouts", "Start, watch and steer rollouts. Example: foreshore rollouts create vision --watch")
models_app = _group("models", "List models, releases and artefacts. Example: foreshore models show vision")
jobs_app = _group("jobs", "List and cancel compile jobs. Example: foreshore jobs list")
enrolments_app = _group("enrolments", "One-time tokens for new devices. Example: foreshore enrolments create dock-9")
tokens_app = _group("tokens", "Make and revoke API tokens. Example: foreshore tokens create me --role operator")
decisions_app = _group("decisions", "Read why something was decided. Example: foreshore decisions show ID")


def command(group: typer.Typer, name: str, show: Show) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mount `work(client, ...) -> document` as a command with the connection options; `show` prints for people."""

    def decorate(work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(*, url: str | None, token_file: Path | None, as_json: bool, **given: Any) -> None:
            login = find_login(ConnectionOptions(url, token_file, as_json), os.environ, Path.home())
            with login.connect() as client:
                document = work(client, **given)
            if as_json:
                typer.echo(json.dumps(document))
            else:
                show(document)

        own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]
        kind = inspect.Parameter.KEYWORD_ONLY
        extra = [
            inspect.Parameter("url", kind, default=None, annotation=Url),
            inspect.Parameter("token_file", kind, default=None, annotation=TokenFile),
            inspect.Parameter("as_json", kind, default=False, annotation=AsJson),
        ]
        parameters = [one.replace(kind=kind) for one in own] + extra
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        group.command(name)(run)
        if name == "list":
            _list_without_verb(group, run)
        return work

    return decorate


def _list_without_verb(group: typer.Typer, run: Callable[..., None]) -> None:
    @group.callback(invoke_without_command=True)
    def _default(
        context: typer.Context, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False
    ) -> None:
        if context.invoked_subcommand is None:
            run(url=url, token_file=token_file, as_json=as_json, **_defaults(run))


def _defaults(run: Callable[..., None]) -> dict[str, Any]:
    taken = {"url", "token_file", "as_json"}
    return {name: p.default for name, p in inspect.signature(run).parameters.items() if name not in taken}


# printing


def _items(document: Any) -> list[dict[str, Any]]:
    return list(document if isinstance(document, list) else document["items"])


def _table(*columns: tuple[str, Callable[[dict[str, Any]], Any]], empty: str) -> Show:
    def show(document: Any) -> None:
        rows = _items(document)
        if not rows:
            typer.echo(empty)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title, _ in columns:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*("-" if (cell := read(row)) in (None, "") else str(cell) for _, read in columns))
        Console(highlight=False, markup=False).print(table)

    return show


def _field(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row.get(name)


def _document(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


def _says(text: str) -> Show:
    return lambda document: typer.echo(text)


def _runs(device: dict[str, Any]) -> str:
    models = device.get("models") or []
    return ", ".join(f"{m['name']} {m.get('active_version') or 'none'} ({m.get('phase', 'idle')})" for m in models)


def _progress(rollout: dict[str, Any]) -> str:
    counts = rollout.get("counts") or {}
    return f"{counts.get('succeeded', 0)}/{rollout.get('num_devices', 0)}"


def _part(text: str) -> str:
    return quote(text, safe="")


# login


@app.command("login")
def login(
    url: Annotated[str, typer.Argument(help="Address of the control plane, for example http://127.0.0.1:8080.")],
    token_file: Annotated[Path, typer.Option("--token-file", help="File with the token, such as HOME/tokens/admin.")],
    tenant: Annotated[str | None, typer.Option(help="Tenant that releases must name.")] = None,
    ca_file: Annotated[str | None, typer.Option(help="Certificate authority of the control plane, PEM.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a token and remember it in a file that only you can read.

    Example: foreshore login http://127.0.0.1:8080 --token-file ~/.foreshore/tokens/admin
    """
    found = Login(url.rstrip("/"), read_token(token_file), tenant, ca_file)
    with found.connect() as client:
        client.get("groups")
    path = save_login(found, os.environ, Path.home())
    typer.echo(json.dumps({"url": found.url, "path": str(path)}) if as_json else f"logged in to {found.url} ({path})")


# devices and groups

_DEVICES = _table(
    ("device", _field("device_id")),
    ("link", lambda row: "online" if row.get("online") else "offline"),
    ("profile", _field("profile")),
    ("runs", _runs),
    ("last seen", _field("last_seen_at")),
    empty="no device is enrolled; make a token: foreshore enrolments create NAME",
)


@command(devices_app, "list", _DEVICES)
def devices_list(client: ControlClient) -> Any:
    """List the devices."""
    return client.get("devices", limit=MAX_ITEMS)


@command(devices_app, "show", _document)
def devices_show(client: ControlClient, device_id: str) -> Any:
    """Show what one device shall run and what it says it runs."""
    return client.get(f"devices/{_part(device_id)}")


@command(devices_app, "revoke", _says("revoked; the device must be enrolled again to come back"))
def devices_revoke(client: ControlClient, device_id: str) -> Any:
    """Make a device's certificate and token worthless at once."""
    return client.delete(f"devices/{_part(device_id)}")


_GROUPS = _table(
    ("group", _field("name")),
    ("filter", _field("filter")),
    ("devices", lambda row: ", ".join(row.get("device_ids") or ())),
    empty="no groups besides 'all'",
)


@command(groups_app, "list", _GROUPS)
def groups_list(client: ControlClient) -> Any:
    """List the groups; `all` always exists."""
    return client.get("groups")


@command(groups_app, "create", _says("created"))
def groups_create(
    client: ControlClient,
    name: str,
    device: Annotated[list[str] | None, typer.Option(help="A device; may be given again.")] = None,
    filter_text: Annotated[str | None, typer.Option("--filter", help="profile=jetson* and online=true")] = None,
) -> Any:
    """Make a group of named devices, or by a filter."""
    if bool(device) == bool(filter_text):
        raise InvalidInputError("a group has either devices or a filter", remedy="give --device or --filter")
    members: dict[str, Any] = {"device_ids": device} if device else {"filter": filter_text}
    return client.post("groups", {"name": name, **members})


@command(groups_app, "delete", _says("deleted"))
def groups_delete(client: ControlClient, name: str) -> Any:
    """Forget a group; its devices stay."""
    return client.delete(f"groups/{_part(name)}")


# rollouts

_ROLLOUTS = _table(
    ("rollout", _field("rollout_id")),
    ("model", lambda row: f"{row.get('model')} {row.get('version')}"),
    ("state", _field("status")),
    ("group", _field("group")),
    ("done", _progress),
    ("reason", _field("reason")),
    empty="no rollouts; start one: foreshore rollouts create MODEL",
)


def _show_rollout(document: Any) -> None:
    _ROLLOUTS([document])
    if document.get("devices"):
        typer.echo("")
        _table(
            ("wave", _field("wave")), ("device", _field("device_id")), ("outcome", _field("state")),
            ("phase", _field("phase")), ("reason", _field("reason")), empty="",
        )(document["devices"])  # fmt: skip


@command(rollouts_app, "list", _ROLLOUTS)
def rollouts_list(client: ControlClient) -> Any:
    """List the rollouts, newest first."""
    return client.get("rollouts")


@command(rollouts_app, "show", _show_rollout)
def rollouts_show(client: ControlClient, rollout_id: str) -> Any:
    """Show one rollout with its devices."""
    return client.get(f"rollouts/{_part(rollout_id)}")


@command(rollouts_app, "create", _show_rollout)
def rollouts_create(
    client: ControlClient,
    release: Annotated[str, typer.Argument(help="A release's digest, or MODEL (newest), or MODEL@VERSION.")],
    group: Annotated[str, typer.Option(help="Which devices.")] = "all",
    waves: Annotated[str, typer.Option(help="Counts and percentages; the first is the canary.")] = "1,100%",
    max_failures: Annotated[int, typer.Option(help="Failures allowed over all waves.")] = 0,
    min_success_ratio: Annotated[float, typer.Option(help="Share of successes needed in each wave.")] = 1.0,
    soak_s: Annotated[float, typer.Option(help="Seconds a device watches the new version.")] = 0.0,
    device_timeout_s: Annotated[float, typer.Option(help="A device silent for this long has failed.")] = 600.0,
    start: Annotated[bool, typer.Option(help="Start at once.")] = True,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for the end; exit 5 when it halts.")] = False,
    timeout_s: Annotated[float, typer.Option(help="With --watch: wait at most this long.")] = 3600.0,
) -> Any:
    """Roll a release out, wave by wave."""
    order = {
        "release": _find_release(client, release), "group": group, "waves": _waves(waves),
        "gate": {"max_failures": max_failures, "min_success_ratio": min_success_ratio},
        "soak_s": soak_s, "device_timeout_s": device_timeout_s, "start": start,
    }  # fmt: skip
    created = client.post("rollouts", order)
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
    def steer(client: ControlClient, rollout_id: str) -> Any:
        return client.post(f"rollouts/{_part(rollout_id)}/{action}")

    steer.__doc__ = help_text
    command(rollouts_app, action, _show_rollout)(steer)


_steering("start", "Start a rollout.")
_steering("pause", "Make no new offers; what is offered goes on.")
_steering("resume", "Go on with a paused rollout.")
_steering("halt", "Stop a rollout for good.")
_steering("rollback", "Take the release off every device that got it.")


def _watch(client: ControlClient, rollout_id: str, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        document = client.get(f"rollouts/{_part(rollout_id)}")
        if document["status"] in ENDS:
            break
        if time.monotonic() > deadline:
            raise TimedOutError(f"rollout {rollout_id} is {document['status']} after {timeout_s:g} s", remedy="go on: "
                                f"foreshore rollouts watch {rollout_id}")  # fmt: skip
        time.sleep(POLL_S)
    if document["status"] == "halted":
        raise GateFailedError(f"rollout {rollout_id} halted: {document.get('reason')}", remedy="see its devices")
    return document


def _waves(text: str) -> list[dict[str, int]]:
    waves = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(%?)", part.strip())
        if match is None:
            raise InvalidInputError(f"wave {part.strip()!r} is not understood", remedy="for example 1,50%,100%")
        waves.append({"percent" if match[2] else "count": int(match[1])})
    return waves


def _find_release(client: ControlClient, text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text
    name, _, version = text.partition("@")
    found = [r for r in _items(client.get("releases", limit=MAX_ITEMS)) if r["name"] == name]
    found = [r for r in found if not version or r["version"] == version]
    if not found:
        raise InvalidInputError(f"there is no release {text!r}", remedy="see: foreshore models")
    newest = max(found, key=lambda release: int(release.get("sequence", 0)))
    return str(newest.get("release") or newest["digest"])


# models, jobs

_MODELS = _table(
    ("model", _field("name")),
    ("kind", _field("kind")),
    ("latest", lambda row: row.get("latest_version") or row.get("version")),
    empty="no models; publish one: foreshore publish model.onnx --name vision --targets cpu-x86",
)


@command(models_app, "list", _MODELS)
def models_list(client: ControlClient) -> Any:
    """List the models."""
    return client.get("models", limit=MAX_ITEMS)


@command(models_app, "show", _document)
def models_show(client: ControlClient, name: str) -> Any:
    """Show one model's releases and artefacts."""
    return client.get(f"models/{_part(name)}")


_JOBS = _table(
    ("job", _field("job_id")),
    ("model", _field("model")),
    ("target", _field("target")),
    ("state", _field("state")),
    ("stage", _field("stage")),
    ("reason", _field("reason")),
    empty="no jobs",
)


@command(jobs_app, "list", _JOBS)
def jobs_list(client: ControlClient) -> Any:
    """List the compile jobs, newest first."""
    return client.get("jobs")


@command(jobs_app, "cancel", _says("cancelled"))
def jobs_cancel(client: ControlClient, job_id: str) -> Any:
    """Cancel a compile job."""
    return client.post(f"jobs/{_part(job_id)}/cancel")


# enrolments and tokens


@command(enrolments_app, "create", lambda document: typer.echo(document["command"]))
def enrolments_create(
    client: ControlClient,
    device_id: str,
    expires_s: Annotated[int, typer.Option(help="The token works this long.")] = 3600,
) -> Any:
    """Make a one-time token and print the command to run on the device."""
    return client.post("enrolments", {"device_id": device_id, "expires_s": expires_s})


enrolments_app.callback(no_args_is_help=True)(lambda: None)

_TOKENS = _table(
    ("token", lambda row: row.get("token_id") or row.get("id")),
    ("name", _field("name")),
    ("role", _field("role")),
    ("created", _field("created_at")),
    empty="no tokens",
)


@command(tokens_app, "list", _TOKENS)
def tokens_list(client: ControlClient) -> Any:
    """List the API tokens; their secrets are not kept."""
    return client.get("tokens")


@command(tokens_app, "create", lambda document: typer.echo(document["token"]))
def tokens_create(
    client: ControlClient,
    name: str,
    role: Annotated[str, typer.Option(help="viewer, operator, publisher, admin, worker or gateway.")] = "viewer",
) -> Any:
    """Make a token; it is printed once and kept only as a hash."""
    return client.post("tokens", {"name": name, "role": role})


@command(tokens_app, "revoke", _says("revoked"))
def tokens_revoke(client: ControlClient, token_id: str) -> Any:
    """End a token."""
    return client.delete(f"tokens/{_part(token_id)}")


# decisions

_DECISIONS = _table(
    ("decision", _field("decision_id")),
    ("kind", _field("kind")),
    ("chosen", _field("chosen")),
    ("subject", _field("subject")),
    ("why", _field("reason")),
    empty="no decisions yet",
)


def _show_decision(document: Any) -> None:
    lines: Sequence[str] = (
        f"{document['kind']}: {document['chosen'] or 'nothing'} at {document['decided_at']}",
        document["reason"],
        f"otherwise: {document['counterfactual']}" if document.get("counterfactual") else "",
    )
    typer.echo("\n".join(line for line in lines if line))


@command(decisions_app, "list", _DECISIONS)
def decisions_list(
    client: ControlClient,
    kind: Annotated[str | None, typer.Option(help="route, offload, placement, mode, rollout or schedule.")] = None,
    subject: Annotated[str | None, typer.Option(help="A device or a rollout.")] = None,
) -> Any:
    """List decisions, newest first."""
    return client.get("decisions", kind=kind, subject=subject)


@command(decisions_app, "show", _show_decision)
def decisions_show(client: ControlClient, decision_id: str) -> Any:
    """Say why: the reason and what would have changed it."""
    return client.get(f"decisions/{_part(decision_id)}")
