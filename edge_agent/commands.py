"""The commands of `foreshore-agent` for people: enrol, install, status; `run` is the daemon."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from edge_agent import daemon
from edge_agent.config import ChipSettings, Home, load_profile
from wire.errors import InvalidInputError
from wire.process import replace_durably

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The Foreshore edge agent.")
HomeOption = Annotated[Path, typer.Option("--home", help="Folder of this agent.")]
MAX_TOKEN_CHARS = 1000


@app.command("enrol")
def enrol_command(
    url: Annotated[str, typer.Option("--url", help="The control plane's address for devices.")],
    home: HomeOption,
    token: Annotated[str | None, typer.Option("--token", help="One-time enrolment token.")] = None,
    token_file: Annotated[
        typer.FileText | None, typer.Option("--token-file", help="File with the token, - for standard input.")
    ] = None,
    profile: Annotated[str, typer.Option("--profile", help="A shipped profile or a YAML file.")] = "cpu-standard",
    pkcs11_module: Annotated[Path | None, typer.Option(help="Library of a security chip to guard the key.")] = None,
    pkcs11_token: Annotated[str | None, typer.Option(help="Label of the chip's token.")] = None,
    pkcs11_pin_file: Annotated[Path | None, typer.Option(help="File with the token's PIN.")] = None,
    root: Annotated[Path | None, typer.Option("--root", help="A root.json to believe, not the server's.")] = None,
) -> None:
    """Make a key, get a certificate. Example: foreshore-agent enrol --url URL --token TOKEN --home ~/agent"""
    from edge_agent.credentials import open_keys
    from edge_agent.enrol import enrol

    os.umask(0o077)
    secret = token or (token_file.read(MAX_TOKEN_CHARS).strip() if token_file else "")
    if not secret:
        raise InvalidInputError("no enrolment token", remedy="give --token, or --token-file so that nobody sees it")
    folder = Home(home)
    if pkcs11_module is not None:
        if pkcs11_token is None or pkcs11_pin_file is None:
            raise InvalidInputError("--pkcs11-module without token and PIN", remedy="give all three --pkcs11 options")
        chip = ChipSettings(module=pkcs11_module, token=pkcs11_token, pin_file=pkcs11_pin_file.resolve())
        replace_durably(folder.chip_file, chip.model_dump_json().encode(), mode=0o600)
    pinned = root.read_bytes() if root else None
    identity = enrol(folder, url, secret, load_profile(profile), open_keys(folder), root=pinned)
    typer.echo(f"enrolled as {identity.tenant}.{identity.device_id}; start it: foreshore-agent run --home {home}")


@app.command("run", add_help_option=False, context_settings={"ignore_unknown_options": True})
def run_command(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Serve the local API and follow the control plane's wishes until SIGTERM."""
    daemon.main(arguments or [])


@app.command("install")
def install_command(
    bundle: Annotated[Path, typer.Argument(help="A bundle: tar file or folder.")],
    home: HomeOption,
) -> None:
    """Install an update from a stick; the agent does it at once if it runs, else when it starts.

    Example: foreshore-agent install /media/stick/update.tar --home ~/agent
    """
    from edge_agent.inbox import install

    desired = install(Home(home), bundle)
    names = ", ".join(f"{model.name} {model.version}" for model in desired.models) or "nothing"
    typer.echo(f"the bundle is genuine and current; this device is to run: {names}")


@app.command("status")
def status_command(home: HomeOption, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """What the journals say about each model; works while the agent runs and when it does not."""
    from edge_agent.journal import Journal
    from edge_agent.state import from_dict

    states = [Journal(path).last for path in sorted(Home(home).state.glob("*.journal"))]
    if as_json:
        typer.echo(json.dumps({"models": [state for state in states if state]}))
        return
    for state in (from_dict(last) for last in states if last):
        version = state.committed.version if state.committed else "nothing"
        typer.echo(f"{state.name}: runs {version}, {state.phase}, {state.result or '-'} {state.reason or ''}".rstrip())
