"""`foreshore engines`: what is built for which hardware, and the publisher's word on it.

An engine is a program that devices run. It was built on a device, so nobody can recompute it here; what a publisher
vouches for is who built it from which of his own artefacts. That is what this command checks and shows before it signs.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any

import typer

from model_registry import command
from model_registry.client import ControlClient
from model_registry.command import AsJson, PassphraseFile, TokenFile, Url
from model_registry.manifest import EngineBuild, parse_engine_build
from model_registry.trust.desk import SigningDesk
from wire.errors import IntegrityError

app = typer.Typer(help="Engines by hardware key: list them, sign them.", rich_markup_mode=None, no_args_is_help=True)

engines_app = typer.Typer(help="Engines by hardware key: list them, sign them.", rich_markup_mode=None)
app.add_typer(engines_app, name="engines")
MAX_ITEMS = 500


@app.callback()
def group() -> None:
    """Engines by hardware key."""


@engines_app.callback(invoke_without_command=True)
def engines(context: typer.Context) -> None:
    """Engines by hardware key: list them, sign them."""
    if context.invoked_subcommand is None:
        list_engines(context)


@engines_app.command("list")
def list_engines(
    context: typer.Context, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """List engine builds and where they are.

    Example: foreshore engines list
    """
    options = command.connection(context, url, token_file, as_json)

    def work() -> dict[str, Any]:
        with command.login_of(options).connect() as client:
            return dict(client.get("engine-builds", limit=MAX_ITEMS))

    def say(result: dict[str, Any]) -> None:
        for one in result["items"]:
            typer.echo(f"{one['build_id']}  {one['model']}  {one['hardware_key']}  {one['state']}  {one['reason']}")
        if not result["items"]:
            typer.echo("no engine is wanted: none of the devices tells a hardware key for what it runs")

    command.run(options, work, say)


@engines_app.command("sign")
def sign(
    context: typer.Context,
    build: Annotated[list[str] | None, typer.Argument(help="Builds; all that wait, when none is given.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Folder of keys and trust.")] = None,
    key: Annotated[list[Path] | None, typer.Option(help="Key file; may be repeated.")] = None,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what was built, by whom and from what, and put it on the publisher's list.

    Example: foreshore engines sign
    """
    options = command.connection(context, url, token_file, as_json)

    def work() -> dict[str, Any]:
        place, secret = folder or command.keys_folder(), command.passphrase(passphrase_file)
        keys = command.load_keys(key or sorted(place.glob("*.pem")), secret)
        signed = []
        with command.login_of(options).connect() as client:
            desk = SigningDesk(client, place / "trust", keys)
            for build_id, built in waiting(client, build or []):
                typer.echo(_described(built), err=True)
                if not yes and not typer.confirm("sign it?", err=True):
                    continue
                client.sign_engine(build_id, *desk.list_release(built))
                signed.append(build_id)
        return {"signed": signed}

    command.run(options, work, lambda result: typer.echo(f"signed {len(result['signed'])} engines"))


def waiting(client: ControlClient, wanted: list[str]) -> list[tuple[str, EngineBuild]]:
    """The builds that wait for a signature, each proven to be of an artefact of one of our releases."""
    found = []
    tenant = client.get("whoami")["tenant"]
    for row in client.get("engine-builds", limit=MAX_ITEMS)["items"]:
        if row["state"] != "awaiting_signature" or (wanted and row["build_id"] not in wanted):
            continue
        built = parse_engine_build(base64.b64decode(row["document"]), expected_digest=row["document_digest"])
        model = client.get(f"models/{built.name}")
        manifests = {one["manifest"] for release in model["releases"] for one in release["artefacts"]}
        if built.tenant != tenant or built.manifest not in manifests:
            raise IntegrityError(
                f"{row['build_id']} is built from {built.manifest[:12]}, which no release of {built.name} names",
                remedy="do not sign it; ask who built it",
            )
        found.append((str(row["build_id"]), built))
    return found


def _described(built: EngineBuild) -> str:
    return (
        f"{built.name}: engine for {built.hardware_key}, {built.size_bytes / 1e6:.1f} MB, built by {built.built_by} at "
        f"{built.built_at} from artefact {built.manifest[:12]}"
    )
