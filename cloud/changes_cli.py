"""`foreshore audit` and `foreshore webhooks`: who changed what, whether the log is whole, and who is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cloud.control.audit_chain import MAX_LINE_BYTES, Verdict, check_export
from cloud.fleet_command import AsJson, TokenFile, Url, add_group, ask, command, field, part, print_answer, says, table
from model_registry.client import ControlClient
from wire.errors import IntegrityError, InvalidInputError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
audit_app = add_group(app, "audit", "Read, export and verify the audit log. Example: foreshore audit verify")
webhooks_app = add_group(
    app, "webhooks", "Addresses that are told of changes. Example: foreshore webhooks create URL --action 'rollout.*'"
)


def _details(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in entry["details"].items())


_ENTRIES = table(
    ("entry", field("sequence")),
    ("when", lambda row: row["at"][:19]),
    ("who", field("actor")),
    ("did", field("action")),
    ("to", field("subject")),
    ("details", _details),
    empty="nothing was changed yet",
)


@command(audit_app, "list", _ENTRIES)
def audit_list(
    client: ControlClient,
    action: Annotated[str | None, typer.Option(help="Only these, by their beginning: rollout.")] = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 50,
) -> Any:
    """List who changed what, newest first."""
    return client.get("audit", action=action, limit=limit)


@audit_app.command("export")
def audit_export(
    file: Annotated[Path, typer.Argument(help="File to write.")], url: Url = None, token_file: TokenFile = None
) -> None:
    """Write the whole chain to a file that can be verified anywhere. Example: foreshore audit export audit.jsonl"""
    with ask(url, token_file) as client, file.open("wb") as opened:
        opened.writelines(client.transport.stream("audit/export"))
    found = _check_file(file)
    typer.echo(f"{found.num_entries} entries up to {found.head} in {file}")


@audit_app.command("verify")
def audit_verify(
    file: Annotated[Path | None, typer.Argument(help="An exported file; without it, the control plane checks.")] = None,
    head: Annotated[str | None, typer.Option(help="The digest that the newest entry must have.")] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Check that no entry was changed, dropped or moved; exit 5 when one was. With FILE it needs no network.

    Example: foreshore audit verify audit.jsonl
    """
    if file is not None:
        found = _check_file(file)
    else:
        with ask(url, token_file) as client:
            answer = client.get("audit/verify")
        found = Verdict(answer["entries"], answer["head"], answer["fault"])
    fault = found.fault
    if fault is None and head is not None and head != found.head:
        fault = f"the newest entry is {found.head}, not {head}"
    if fault is not None:
        raise IntegrityError(f"the audit chain is broken: {fault}", remedy=f"{found.num_entries} entries before it fit")
    document = {"entries": found.num_entries, "head": found.head, "is_whole": True, "fault": None}
    print_answer(document, as_json, lambda _: typer.echo(f"whole: {found.num_entries} entries up to {found.head}"))


def _check_file(file: Path) -> Verdict:
    try:
        with file.open("rb") as opened:
            return check_export(iter(lambda: opened.readline(MAX_LINE_BYTES + 1), b""))
    except OSError as error:
        raise InvalidInputError(f"{file} cannot be read: {error.strerror}", remedy="give an exported file") from error


_WEBHOOKS = table(
    ("webhook", field("webhook_id")), ("address", field("url")), ("told of", lambda row: ", ".join(row["actions"])),
    ("newest", lambda row: (row.get("newest_delivery") or {}).get("state")),
    ("answer", lambda row: (row.get("newest_delivery") or {}).get("answer")),
    empty="no webhooks; make one: foreshore webhooks create https://host/path",
)  # fmt: skip


@command(webhooks_app, "list", _WEBHOOKS)
def webhooks_list(client: ControlClient) -> Any:
    """List the webhooks."""
    return client.get("webhooks")


@command(webhooks_app, "create", lambda document: typer.echo(document["secret"]))
def webhooks_create(
    client: ControlClient,
    address: Annotated[str, typer.Argument(help="https://host/path (http only on this machine).")],
    action: Annotated[list[str] | None, typer.Option(help="What it is told of; may be given again.")] = None,
) -> Any:
    """Make a webhook and print its secret, once. Example: foreshore webhooks create URL --action 'rollout.*'"""
    return client.post("webhooks", {"url": address, "actions": action or ["*"]})


@command(webhooks_app, "delete", says("deleted"))
def webhooks_delete(client: ControlClient, webhook_id: str) -> Any:
    """Forget a webhook."""
    return client.delete(f"webhooks/{part(webhook_id)}")


@command(webhooks_app, "ping", says("queued; see: foreshore webhooks deliveries ID"))
def webhooks_ping(client: ControlClient, webhook_id: str) -> Any:
    """Send it a message that says nothing."""
    return client.post(f"webhooks/{part(webhook_id)}/ping")


_DELIVERIES = table(
    ("delivery", field("delivery_id")), ("action", field("action")), ("state", field("state")),
    ("attempts", field("attempts")), ("answer", field("answer")), ("due", field("due_at")),
    empty="nothing was sent yet",
)  # fmt: skip


@command(webhooks_app, "deliveries", _DELIVERIES)
def webhooks_deliveries(client: ControlClient, webhook_id: str) -> Any:
    """List what a webhook was told, newest first."""
    return client.get(f"webhooks/{part(webhook_id)}/deliveries")


@command(webhooks_app, "resend", says("queued"))
def webhooks_resend(client: ControlClient, delivery_id: str) -> Any:
    """Send a message again."""
    return client.post(f"webhook-deliveries/{part(delivery_id)}/resend")
