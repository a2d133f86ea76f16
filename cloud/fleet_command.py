"""What all fleet commands share: connection options, one API call, and its answer as a table or as JSON.

Which control plane, as whom: `model_registry.login`. A command named `list` is also the group without a verb.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from model_registry.client import ControlClient
from model_registry.login import ConnectionOptions, find_login

MAX_ITEMS = 500  # the API gives no more at once

Url = Annotated[str | None, typer.Option("--url", help="Control plane; else FORESHORE_URL, else the login.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the API token.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the API's JSON, for programs.")]
Show = Callable[[Any], None]


def add_group(app: typer.Typer, name: str, help_text: str) -> typer.Typer:
    """A group of commands below `app`."""
    group = typer.Typer(help=help_text, rich_markup_mode=None)
    app.add_typer(group, name=name)
    return group


def ask(url: str | None, token_file: Path | None) -> ControlClient:
    """A client of the control plane that the options, the environment or the login name."""
    return find_login(ConnectionOptions(url, token_file, False), os.environ, Path.home()).connect()


def print_answer(document: Any, as_json: bool, show: Show) -> None:
    """The document itself for programs, what `show` makes of it for people."""
    if as_json:
        typer.echo(json.dumps(document))
    else:
        show(document)


def command(group: typer.Typer, name: str, show: Show) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mount `work(client, ...) -> document` as a command with the connection options; `show` prints for people."""

    def decorate(work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(*, url: str | None, token_file: Path | None, as_json: bool, **given: Any) -> None:
            with ask(url, token_file) as client:
                document = work(client, **given)
            print_answer(document, as_json, show)

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


def items(document: Any) -> list[dict[str, Any]]:
    """The rows of a listing."""
    return list(document if isinstance(document, list) else document["items"])


def table(*columns: tuple[str, Callable[[dict[str, Any]], Any]], empty: str) -> Show:
    """Print rows as a table, or `empty` when there are none."""

    def show(document: Any) -> None:
        rows = items(document)
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


def field(name: str) -> Callable[[dict[str, Any]], Any]:
    """Reads one field of a row."""
    return lambda row: row.get(name)


def show_document(document: Any) -> None:
    """Print a document as it is."""
    typer.echo(json.dumps(document, indent=2))


def says(text: str) -> Show:
    """Print `text`, whatever the answer."""
    return lambda document: typer.echo(text)


def part(text: str) -> str:
    """`text` as one part of a path."""
    return quote(text, safe="")
