"""What the commands of this package share: where to connect, how a result or an error is told, passphrases and keys.

Commands only gather what a person said and print what came of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from model_registry.exit_codes import INTERRUPTED, exit_code
from model_registry.login import ConnectionOptions, Login, config_folder, find_login
from model_registry.trust.keys import decode_public_key, load_key
from wire.errors import ForeshoreError, InvalidInputError

Url = Annotated[str | None, typer.Option("--url", help="Control plane; else FORESHORE_URL, else the login.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the API token.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object last, for programs.")]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Keys' passphrase; else FORESHORE_KEY_PASSPHRASE.")
]


def run(options: ConnectionOptions, work: Callable[[], dict[str, Any]], say: Callable[[dict[str, Any]], None]) -> None:
    """Do the work and tell its result, for people or as JSON; an error becomes its exit code."""
    try:
        result = work()
    except ForeshoreError as error:
        _fail(options, error)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if options.as_json:
        typer.echo(json.dumps(result))
    else:
        say(result)


def connection(context: typer.Context, url: str | None, token_file: Path | None, as_json: bool) -> ConnectionOptions:
    """The command's own options before those of the entry point."""
    outer = context.find_object(ConnectionOptions) or ConnectionOptions()
    return ConnectionOptions(url or outer.url, token_file or outer.token_file, as_json or outer.as_json)


def login_of(options: ConnectionOptions) -> Login:
    """The login to use."""
    return find_login(options, os.environ, Path.home())


def keys_folder() -> Path:
    """Where this person's keys are unless a command says otherwise."""
    return config_folder(os.environ, Path.home()) / "keys"


def passphrase(path: Path | None) -> str | None:
    """The passphrase in a file, else in the environment."""
    if path is None:
        return os.environ.get("FORESHORE_KEY_PASSPHRASE")
    try:
        return path.read_text().rstrip("\r\n")
    except OSError as error:
        raise InvalidInputError(f"passphrase file {path} cannot be read", remedy="give a text file") from error


def load_keys(paths: list[Path], secret: str | None) -> list[Ed25519PrivateKey]:
    """The private keys in these files."""
    return [load_key(path, secret) for path in paths]


def public_key(text: str, secret: str | None) -> Ed25519PublicKey:
    """A public key given in base64, or as the file of its private key."""
    path = Path(text)
    return load_key(path, secret).public_key() if path.is_file() else decode_public_key(text)


def _fail(options: ConnectionOptions, error: ForeshoreError) -> NoReturn:
    typer.echo(f"{error.code}: {error}", err=True)
    if log := error.details.get("log"):
        typer.echo(log, err=True)
    if options.as_json:
        typer.echo(json.dumps({"error": error.to_dict()}, default=str))
    raise typer.Exit(exit_code(error)) from error
