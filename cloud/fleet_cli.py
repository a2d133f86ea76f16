"""The commands that look after a fleet: login, devices, groups, models, jobs, enrolments, tokens, decisions.

A command asks the API for one thing and prints it: a table for people, with `--json` the API's own document. Rollouts
are in `rollouts_cli`, the audit chain and webhooks in `changes_cli`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cloud.fleet_command import (
    MAX_ITEMS,
    AsJson,
    add_group,
    command,
    field,
    part,
    says,
    show_document,
    table,
)
from model_registry.client import ControlClient
from model_registry.login import Login, read_token, save_login
from wire.errors import InvalidInputError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


devices_app = add_group(app, "devices", "List, show and revoke devices. Example: foreshore devices show dock-camera-1")
groups_app = add_group(
    app, "groups", "List and change groups. Example: foreshore groups create docks --filter 'profile=jetson*'"
)
models_app = add_group(app, "models", "List models, releases and artefacts. Example: foreshore models show vision")
jobs_app = add_group(app, "jobs", "List and cancel compile jobs. Example: foreshore jobs list")
enrolments_app = add_group(
    app, "enrolments", "One-time tokens for new devices. Example: foreshore enrolments create dock-9"
)
tokens_app = add_group(app, "tokens", "Make and revoke API tokens. Example: foreshore tokens create me --role operator")
decisions_app = add_group(app, "decisions", "Read why something was decided. Example: foreshore decisions show ID")


def _runs(device: dict[str, Any]) -> str:
    models = device.get("models") or []
    return ", ".join(f"{m['name']} {m.get('active_version') or 'none'} ({m.get('phase', 'idle')})" for m in models)


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

_DEVICES = table(
    ("device", field("device_id")),
    ("link", lambda row: "online" if row.get("online") else "offline"),
    ("profile", field("profile")),
    ("runs", _runs),
    ("last seen", field("last_seen_at")),
    empty="no device is enrolled; make a token: foreshore enrolments create NAME",
)


@command(devices_app, "list", _DEVICES)
def devices_list(
    client: ControlClient,
    group: Annotated[str | None, typer.Option(help="Only of this group.")] = None,
    filter_text: Annotated[str | None, typer.Option("--filter", help="profile = jetson* and online = true")] = None,
) -> Any:
    """List the devices."""
    return client.get("devices", limit=MAX_ITEMS, group=group, filter=filter_text)


@command(devices_app, "show", show_document)
def devices_show(client: ControlClient, device_id: str) -> Any:
    """Show what one device shall run and what it says it runs."""
    return client.get(f"devices/{part(device_id)}")


@command(devices_app, "label", says("labelled"))
def devices_label(
    client: ControlClient,
    device_id: str,
    labels: Annotated[list[str] | None, typer.Argument(help="NAME=VALUE to set, NAME= to take away.")] = None,
) -> Any:
    """Change a device's labels, which filters ask for as label.NAME. Example: devices label dock-1 site=hamburg"""
    path = f"devices/{part(device_id)}"
    wanted = dict(client.get(path).get("labels") or {})
    for text in labels or ():
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise InvalidInputError(f"label {text!r} is not understood", remedy="NAME=VALUE, or NAME= to take it away")
        wanted = {**wanted, name: value} if value else {k: v for k, v in wanted.items() if k != name}
    return client.put(f"{path}/labels", {"labels": wanted})


@command(devices_app, "revoke", says("revoked; the device must be enrolled again to come back"))
def devices_revoke(client: ControlClient, device_id: str) -> Any:
    """Make a device's certificate and token worthless at once."""
    return client.delete(f"devices/{part(device_id)}")


_GROUPS = table(
    ("group", field("name")),
    ("devices", field("num_devices")),
    ("filter or names", lambda row: row.get("filter") or ", ".join(row.get("device_ids") or ())),
    empty="no groups besides 'all'",
)


@command(groups_app, "list", _GROUPS)
def groups_list(client: ControlClient) -> Any:
    """List the groups; `all` always exists."""
    return client.get("groups")


@command(groups_app, "create", says("created"))
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


@command(groups_app, "delete", says("deleted"))
def groups_delete(client: ControlClient, name: str) -> Any:
    """Forget a group; its devices stay."""
    return client.delete(f"groups/{part(name)}")


# models, jobs

_COMPATIBILITY = table(
    ("device", field("device_id")),
    ("gets", field("target")),
    ("rule", field("rule")),
    ("reason", field("reason")),
    empty="no device is enrolled; enrol one: foreshore enrolments create NAME",
)

_MODELS = table(
    ("model", field("name")),
    ("kind", field("kind")),
    ("latest", lambda row: row.get("latest_version") or row.get("version")),
    empty="no models; publish one: foreshore publish model.onnx --name vision --targets cpu-x86",
)


@command(models_app, "list", _MODELS)
def models_list(client: ControlClient) -> Any:
    """List the models."""
    return client.get("models", limit=MAX_ITEMS)


@command(models_app, "show", show_document)
def models_show(client: ControlClient, name: str) -> Any:
    """Show one model's releases and artefacts."""
    return client.get(f"models/{part(name)}")


@command(models_app, "compatibility", _COMPATIBILITY)
def models_compatibility(
    client: ControlClient,
    name: str,
    version: Annotated[str | None, typer.Option(help="A version; the newest by default.")] = None,
) -> Any:
    """Say which devices can run a model, which artefact each would get, and the rule that decides."""
    return client.get(f"models/{part(name)}/compatibility", limit=MAX_ITEMS, version=version)


_JOBS = table(
    ("job", field("job_id")),
    ("model", field("model")),
    ("target", field("target")),
    ("state", field("state")),
    ("stage", field("stage")),
    ("reason", field("reason")),
    empty="no jobs",
)


@command(jobs_app, "list", _JOBS)
def jobs_list(client: ControlClient) -> Any:
    """List the compile jobs, newest first."""
    return client.get("jobs")


@command(jobs_app, "cancel", says("cancelled"))
def jobs_cancel(client: ControlClient, job_id: str) -> Any:
    """Cancel a compile job."""
    return client.post(f"jobs/{part(job_id)}/cancel")


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

_TOKENS = table(
    ("token", lambda row: row.get("token_id") or row.get("id")),
    ("name", field("name")),
    ("role", field("role")),
    ("created", field("created_at")),
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


@command(tokens_app, "revoke", says("revoked"))
def tokens_revoke(client: ControlClient, token_id: str) -> Any:
    """End a token."""
    return client.delete(f"tokens/{part(token_id)}")


# decisions

_DECISIONS = table(
    ("decision", field("decision_id")),
    ("kind", field("kind")),
    ("chosen", field("chosen")),
    ("subject", field("subject")),
    ("why", field("reason")),
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
    return client.get(f"decisions/{part(decision_id)}")
