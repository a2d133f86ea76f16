"""`foreshore keys`, the offline side of trust: keys of root, targets and publishers are made, named, changed and used.

All commands work on a folder of key files; beside them, in `trust/`, lies the root that this person trusts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from model_registry import command
from model_registry.command import AsJson, PassphraseFile, TokenFile, Url
from model_registry.login import ConnectionOptions
from model_registry.trust import roles
from model_registry.trust.desk import SigningDesk, Waiting
from model_registry.trust.keys import create_key, decode_public_key, encode_public_key, load_key, tuf_key
from wire.errors import NotFoundError

Folder = Annotated[Path | None, typer.Option("--folder", help="Folder of keys [~/.config/foreshore/keys].")]
KeyFiles = Annotated[list[Path] | None, typer.Option("--key", help="Key to sign with; else all in the folder.")]
Threshold = Annotated[int, typer.Option(help="How many of the keys must sign.")]
Keys = Annotated[list[str], typer.Option(help="Public key in base64, or a key file; may be repeated.")]

app = typer.Typer(no_args_is_help=True, help="Keys that say what may exist: root, targets, publishers.")


@app.command("create")
def create(
    context: typer.Context,
    path: Annotated[Path | None, typer.Argument(help="File to write [publisher.pem in the keys folder].")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key in a file that only you can read.

    Example: foreshore keys create alice.pem
    """
    target = path or command.keys_folder() / "publisher.pem"
    _run_locally(context, as_json, target, lambda: create_key(target, command.passphrase(passphrase_file)))


@app.command("show")
def show(
    context: typer.Context,
    path: Annotated[Path | None, typer.Argument(help="Key file [publisher.pem in the keys folder].")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the public half of a key and its id.

    Example: foreshore keys show alice.pem
    """
    target = path or command.keys_folder() / "publisher.pem"
    _run_locally(context, as_json, target, lambda: load_key(target, command.passphrase(passphrase_file)))


@app.command("init")
def init(
    context: typer.Context,
    folder: Folder = None,
    publisher: Annotated[str, typer.Option(help="Name of the first publisher.")] = "publisher",
    root_key: Annotated[list[str] | None, typer.Option(help="Further root key; may be repeated.")] = None,
    root_threshold: Threshold = 1,
    targets_key: Annotated[list[str] | None, typer.Option(help="Further targets key; may be repeated.")] = None,
    targets_threshold: Threshold = 1,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Make root.pem, targets.pem and publisher.pem (those that are missing) and the tenant's root of trust.

    Keep root.pem and targets.pem off line afterwards. Example: foreshore keys init --publisher alice
    """

    def work(desk: SigningDesk, place: Path, secret: str | None) -> dict[str, Any]:
        own = {name: load_key(place / f"{name}.pem", secret).public_key() for name in ("root", "targets", "publisher")}
        desk.initialise(
            [own["root"], *(command.public_key(one, secret) for one in root_key or ())],
            [own["targets"], *(command.public_key(one, secret) for one in targets_key or ())],
            root_threshold=root_threshold,
            targets_threshold=targets_threshold,
        )
        if root_threshold == targets_threshold == 1:
            desk.add_publisher(publisher, [own["publisher"]])
        return {"folder": str(place), "publisher": publisher, "waiting": _waiting(desk)}

    def prepare(place: Path, secret: str | None) -> None:
        for name in ("root", "targets", "publisher"):
            if not (place / f"{name}.pem").exists():
                create_key(place / f"{name}.pem", secret)

    _run_at_desk(_options(context, url, token_file, as_json), folder, None, passphrase_file, work, prepare)


@app.command("add-publisher")
def add_publisher(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the publisher: lower-case letters, digits, hyphens.")],
    public_key: Keys,
    threshold: Threshold = 1,
    model: Annotated[list[str] | None, typer.Option(help="Only these models; * for parts of names.")] = None,
    folder: Folder = None,
    key: KeyFiles = None,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Let a publisher list releases; targets signs. The publisher answers with: foreshore keys sign

    Example: foreshore keys add-publisher alice --public-key 5vZ...= --model vision
    """

    def work(desk: SigningDesk, _place: Path, secret: str | None) -> dict[str, Any]:
        keys = [command.public_key(one, secret) for one in public_key]
        desk.add_publisher(name, keys, threshold=threshold, models=model or ["*"])
        return {"publisher": name, "waiting": _waiting(desk)}

    _run_at_desk(_options(context, url, token_file, as_json), folder, key, passphrase_file, work)


@app.command("rotate")
def rotate(
    context: typer.Context,
    role: Annotated[str, typer.Argument(help="root, targets, snapshot, timestamp, director, or a publisher.")],
    public_key: Annotated[
        list[str] | None, typer.Option(help="New key (base64 or file); online roles make their own.")
    ] = None,
    threshold: Threshold = 1,
    folder: Folder = None,
    key: KeyFiles = None,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a role new keys; the old ones count no longer.

    Example: foreshore keys rotate timestamp
    """
    options = _options(context, url, token_file, as_json)

    def work(desk: SigningDesk, _place: Path, secret: str | None) -> dict[str, Any]:
        if role in roles.ONLINE_ROLES:
            with command.login_of(options).connect() as client:
                made = client.post("trust/online-keys", {"role": role})["online_keys"][role]
            keys = [decode_public_key(made)]
        else:
            keys = [command.public_key(one, secret) for one in public_key or ()]
        desk.rotate(role, keys, threshold=threshold)
        return {"role": role, "waiting": _waiting(desk)}

    _run_at_desk(options, folder, key, passphrase_file, work)


@app.command("sign")
def sign(
    context: typer.Context,
    role: Annotated[str | None, typer.Argument(help="Only this role; else all that wait for you.")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Sign the role anew with a later expiry.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    folder: Folder = None,
    key: KeyFiles = None,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Look at the documents that wait for signatures and add yours.

    Example: foreshore keys sign
    """

    def work(desk: SigningDesk, _place: Path, _secret: str | None) -> dict[str, Any]:
        if renew and role is not None:
            desk.renew(role)
        signed = [one.role for one in desk.waiting() if role in (None, one.role) and _agrees(desk, one, yes or as_json)]
        return {"signed": signed, "begun": desk.begin_lists(), "waiting": _waiting(desk)}

    _run_at_desk(_options(context, url, token_file, as_json), folder, key, passphrase_file, work)


@app.command("withdraw")
def withdraw(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[str, typer.Argument(help="Version of the release.")],
    folder: Folder = None,
    key: KeyFiles = None,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Take a release off your publisher's list: no device installs it any longer; where it runs it goes on running.

    Example: foreshore keys withdraw vision 1.2.0
    """
    options = _options(context, url, token_file, as_json)

    def work(desk: SigningDesk, _place: Path, _secret: str | None) -> dict[str, Any]:
        with command.login_of(options).connect() as client:
            releases = client.get(f"models/{model}")["releases"]
        digest = next((one["digest"] for one in releases if one["version"] == version), None)
        if digest is None:
            known = ", ".join(str(one["version"]) for one in releases) or "none"
            raise NotFoundError(f"{model!r} has no release {version!r}", remedy=f"its releases: {known}")
        return {"publisher": desk.withdraw(model, digest), "withdrawn": f"{model} {version}", "waiting": _waiting(desk)}

    _run_at_desk(options, folder, key, passphrase_file, work)


@app.command("list")
def list_(context: typer.Context, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """Show roles, their versions, expiry and keys, and what waits for signatures.

    Example: foreshore keys list
    """
    options = _options(context, url, token_file, as_json)

    def work() -> dict[str, Any]:
        with command.login_of(options).connect() as client:
            return client.get_trust()

    def say(result: dict[str, Any]) -> None:
        for one in result["roles"]:
            typer.echo(f"{one['role']:<16} version {one['version']:<5} expires {one['expires_at'][:10]}")
            for name, role in {**one.get("keys", {}), **one.get("delegations", {})}.items():
                typer.echo(f"  {name:<14} {role['threshold']} of {', '.join(k[:16] for k in role['key_ids'])}")
        for one in result["pending"]:
            typer.echo(f"{one['role']:<16} version {one['version']:<5} {one['num_signatures']} of {one['threshold']}")

    command.run(options, work, say)


def _run_at_desk(
    options: ConnectionOptions,
    folder: Path | None,
    key_files: list[Path] | None,
    passphrase_file: Path | None,
    work: Callable[[SigningDesk, Path, str | None], dict[str, Any]],
    prepare: Callable[[Path, str | None], None] = lambda *_: None,
) -> None:
    def at_desk() -> dict[str, Any]:
        place, secret = folder or command.keys_folder(), command.passphrase(passphrase_file)
        prepare(place, secret)
        keys = command.load_keys(key_files or sorted(place.glob("*.pem")), secret)
        with command.login_of(options).connect() as client:
            return work(SigningDesk(client, place / "trust", keys), place, secret)

    command.run(options, at_desk, _say)


def _run_locally(context: typer.Context, as_json: bool, path: Path, key: Callable[[], Ed25519PrivateKey]) -> None:
    def work() -> dict[str, Any]:
        public = key().public_key()
        return {"key_id": tuf_key(public).keyid, "public_key": encode_public_key(public), "path": str(path)}

    command.run(_options(context, None, None, as_json), work, _say)


def _agrees(desk: SigningDesk, waiting: Waiting, is_settled: bool) -> bool:
    if not desk.may_sign(waiting):
        return False
    if not is_settled:
        typer.echo(f"{waiting.role} version {waiting.version}")
        typer.echo("\n".join(f"  {line}" for line in waiting.changes))
        if not typer.confirm("sign this?"):
            return False
    desk.sign(waiting)
    return True


def _waiting(desk: SigningDesk) -> list[str]:
    return [f"{one.role} {one.version}: {one.num_signatures} of {one.threshold}" for one in desk.waiting()]


def _say(result: dict[str, Any]) -> None:
    for name, value in result.items():
        text = ", ".join(value) if isinstance(value, list) else value
        if text:
            typer.echo(f"{name.replace('_', ' '):<11} {text}")


_options = command.connection

if __name__ == "__main__":
    sys.exit(app())
