"""The commands `foreshore publish` and `foreshore keys`, mounted by the `foreshore` entry point.

Commands only gather what a person said and print what came of it; the work is in `publish`, `trust` and `client`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console

from model_registry.exit_codes import INTERRUPTED, exit_code
from model_registry.login import ConnectionOptions, Login, config_folder, find_login
from model_registry.manifest import Vision
from model_registry.publish import Publisher, PublishRequest, PublishResult
from model_registry.publish_view import PublishView
from model_registry.trust import create_key, decode_public_key, encode_public_key, load_key
from wire.envelope import key_id
from wire.errors import ForeshoreError, InvalidInputError, NotFoundError

MAX_DOCUMENT_BYTES = 4 << 20

Url = Annotated[str | None, typer.Option("--url", help="Control plane; else FORESHORE_URL, else the login.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="File with the API token.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object last, for programs.")]
KeyFile = Annotated[Path | None, typer.Option("--key", help="Publisher key [~/.config/foreshore/publisher.pem].")]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Key's passphrase; else FORESHORE_KEY_PASSPHRASE.")
]

keys_app = typer.Typer(no_args_is_help=True, help="Publisher keys: who may sign releases.")


def register(app: typer.Typer) -> None:
    """Mount the commands of this file on `app`."""
    app.command("publish")(publish)
    app.add_typer(keys_app, name="keys")


def publish(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="ONNX file, Hugging Face style folder, or GGUF file.")],
    name: Annotated[str, typer.Option(help="Model name: lower-case letters, digits, hyphens.")],
    targets: Annotated[str, typer.Option(help="Comma-separated, for example cpu-x86,jetson-orin.")],
    version: Annotated[str | None, typer.Option(help="Version; else the control plane counts.")] = None,
    kind: Annotated[str | None, typer.Option(help="tensor or language; else from the format.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the model, for example Apache-2.0.")] = "",
    recipe: Annotated[Path | None, typer.Option(help="YAML or JSON: precision, gates, calibration.")] = None,
    golden: Annotated[Path | None, typer.Option(help="Inputs with right outputs (.npz or .json).")] = None,
    vision: Annotated[Path | None, typer.Option(help="How images become input (.json or .yaml).")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant that the release must name.")] = None,
    key: KeyFile = None,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Publish a model: check, upload, compile for each target, verify, sign.

    Example: foreshore publish mobilenet_v2.onnx --name vision --targets cpu-x86,jetson-orin
    """
    options = _options(context, url, token_file, as_json)

    def work() -> dict[str, Any]:
        login = _login(options)
        request = PublishRequest(
            path=path,
            name=name,
            targets=tuple(dict.fromkeys(part.strip() for part in targets.split(",") if part.strip())),
            version=version,
            kind=_kind(kind),
            licence=licence,
            recipe=_document(recipe) if recipe else None,
            golden=golden,
            vision=_vision(vision) if vision else None,
            tenant=tenant or login.tenant,
        )
        signer = load_key(key or _default_key(), _passphrase(passphrase_file))
        with login.connect() as client, PublishView(Console(stderr=options.as_json)) as view:
            result = Publisher(client, signer, view).publish(request)
            view.finish()
        return _summary(result)

    _run(options, work, _say_published)


@keys_app.command("create")
def keys_create(
    context: typer.Context,
    path: Annotated[Path | None, typer.Argument(help="File to write [~/.config/foreshore/publisher.pem].")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a new publisher key in a file that only you can read.

    Example: foreshore keys create
    """
    target = path or _default_key()
    _run(_options(context, None, None, as_json), lambda: _create(target, passphrase_file), _say_key)


@keys_app.command("show")
def keys_show(
    context: typer.Context,
    path: Annotated[Path | None, typer.Argument(help="Key file [~/.config/foreshore/publisher.pem].")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the public half of a key and its id.

    Example: foreshore keys show
    """
    target = path or _default_key()
    _run(_options(context, None, None, as_json), lambda: _show(target, passphrase_file), _say_key)


@keys_app.command("add")
def keys_add(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="Whose key this is.")],
    key: Annotated[str | None, typer.Argument(help="Public key in base64, or a key file.")] = None,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Let a key sign releases (administrators only).

    Example: foreshore keys add --name alice
    """
    options = _options(context, url, token_file, as_json)

    def work() -> dict[str, Any]:
        public_key = _public_key(key, passphrase_file)
        with _login(options).connect() as client:
            answer = client.post("publisher-keys", {"public_key": public_key, "name": name}) or {}
        return {"key_id": key_id(decode_public_key(public_key)), "public_key": public_key, "name": name, **answer}

    _run(options, work, _say_key)


@keys_app.command("list")
def keys_list(context: typer.Context, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """List the keys that may sign releases.

    Example: foreshore keys list
    """
    options = _options(context, url, token_file, as_json)

    def work() -> dict[str, Any]:
        with _login(options).connect() as client:
            answer = client.get("publisher-keys")
        return answer if isinstance(answer, dict) else {"items": answer}

    def say(result: dict[str, Any]) -> None:
        for item in result.get("items", []):
            typer.echo(f"{str(item.get('key_id', ''))[:16]}  {item.get('name', '')}")

    _run(options, work, say)


def _run(options: ConnectionOptions, work: Callable[[], dict[str, Any]], say: Callable[[dict[str, Any]], None]) -> None:
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


def _fail(options: ConnectionOptions, error: ForeshoreError) -> NoReturn:
    typer.echo(f"{error.code}: {error}", err=True)
    if log := error.details.get("log"):
        typer.echo(log, err=True)
    if options.as_json:
        typer.echo(json.dumps({"error": error.to_dict()}, default=str))
    raise typer.Exit(exit_code(error)) from error


def _options(context: typer.Context, url: str | None, token_file: Path | None, as_json: bool) -> ConnectionOptions:
    outer = context.find_object(ConnectionOptions) or ConnectionOptions()
    return ConnectionOptions(url or outer.url, token_file or outer.token_file, as_json or outer.as_json)


def _login(options: ConnectionOptions) -> Login:
    return find_login(options, os.environ, Path.home())


def _default_key() -> Path:
    return config_folder(os.environ, Path.home()) / "publisher.pem"


def _passphrase(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get("FORESHORE_KEY_PASSPHRASE")
    try:
        return path.read_text().rstrip("\r\n")
    except OSError as error:
        raise InvalidInputError(f"passphrase file {path} cannot be read", remedy="give a text file") from error


def _create(path: Path, passphrase_file: Path | None) -> dict[str, Any]:
    return _described(path, create_key(path, _passphrase(passphrase_file)).public_key())


def _show(path: Path, passphrase_file: Path | None) -> dict[str, Any]:
    return _described(path, load_key(path, _passphrase(passphrase_file)).public_key())


def _described(path: Path, public_key: Any) -> dict[str, Any]:
    return {"key_id": key_id(public_key), "public_key": encode_public_key(public_key), "path": str(path)}


def _public_key(key: str | None, passphrase_file: Path | None) -> str:
    path = Path(key) if key else _default_key()
    if key and not path.exists():
        return encode_public_key(decode_public_key(key))
    return encode_public_key(load_key(path, _passphrase(passphrase_file)).public_key())


def _kind(kind: str | None) -> Any:
    if kind not in (None, "tensor", "language"):
        raise InvalidInputError(f"kind {kind!r} is unknown", remedy="tensor or language")
    return kind


def _document(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}", remedy="give a YAML or JSON file") from error
    if len(text) > MAX_DOCUMENT_BYTES:
        raise InvalidInputError(f"{path} has {len(text)} bytes", remedy=f"at most {MAX_DOCUMENT_BYTES}")
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is neither YAML nor JSON: {error}", remedy="correct it") from error
    if not isinstance(document, dict):
        raise InvalidInputError(f"{path} is not a mapping", remedy="write NAME: VALUE lines")
    return document


def _vision(path: Path) -> dict[str, Any]:
    try:
        return Vision.model_validate(_document(path)).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(f"{path}: {where}: {first['msg']}", remedy="see docs/registry.md") from error


def _summary(result: PublishResult) -> dict[str, Any]:
    release = result.release
    return {
        "publication_id": result.publication_id,
        "release": result.release_digest,
        "tenant": release.tenant,
        "name": release.name,
        "version": release.version,
        "source_bytes": result.source_bytes,
        "uploaded_bytes": result.uploaded_bytes,
        "artefacts": [
            {
                "target": artefact.target,
                "manifest": artefact.manifest,
                "runtime": artefact.runtime,
                "precision": artefact.precision,
                "size_bytes": artefact.size_bytes,
                "deltas": {delta.name: delta.wire_bytes for delta in artefact.deltas},
                "gates": [g.model_dump(mode="json") for g in result.manifests[artefact.target].gates],
            }
            for artefact in release.artefacts
        ],
    }


def _say_published(result: dict[str, Any]) -> None:
    typer.echo(f"released {result['name']} {result['version']}  {result['release'][:16]}")
    for artefact in result["artefacts"]:
        typer.echo(
            f"  {artefact['target']:<16} {artefact['precision']:<8} {artefact['runtime']:<18} "
            f"{artefact['size_bytes'] / (1 << 20):.1f} MiB"
        )


def _say_key(result: dict[str, Any]) -> None:
    if "path" in result:
        typer.echo(f"key file    {result['path']}")
    typer.echo(f"key id      {result['key_id']}\npublic key  {result['public_key']}")


app = typer.Typer(no_args_is_help=True)
register(app)

if __name__ == "__main__":
    sys.exit(app())
