"""The command `foreshore publish`, mounted by the `foreshore` entry point.

It only gathers what a person said and prints what came of it; the work is in `publish`, `trust` and `client`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console

from model_registry import command
from model_registry.command import AsJson, PassphraseFile, TokenFile, Url
from model_registry.manifest import Vision
from model_registry.publish import Publisher, PublishRequest, PublishResult
from model_registry.publish_view import PublishView
from model_registry.trust.desk import SigningDesk
from wire.errors import InvalidInputError, NotFoundError

MAX_DOCUMENT_BYTES = 4 << 20

KeyFiles = Annotated[
    list[Path] | None, typer.Option("--key", help="Publisher key [~/.config/foreshore/keys/publisher.pem].")
]


def register(app: typer.Typer) -> None:
    """Mount the command of this file on `app`."""
    app.command("publish")(publish)


def publish(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="ONNX, GGUF or torch.export (.pt2) file, or Hugging Face style folder.")],
    name: Annotated[str, typer.Option(help="Model name: lower-case letters, digits, hyphens.")],
    targets: Annotated[str, typer.Option(help="Comma-separated, for example cpu-x86,jetson-orin.")],
    version: Annotated[str | None, typer.Option(help="Version; else the control plane counts.")] = None,
    kind: Annotated[str | None, typer.Option(help="tensor or language; else from the format.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the model, for example Apache-2.0.")] = "",
    recipe: Annotated[Path | None, typer.Option(help="YAML or JSON: precision, gates, calibration.")] = None,
    golden: Annotated[Path | None, typer.Option(help="Inputs with right outputs (.npz or .json).")] = None,
    vision: Annotated[Path | None, typer.Option(help="How images become input (.json or .yaml).")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant that the release must name.")] = None,
    key: KeyFiles = None,
    passphrase_file: PassphraseFile = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Publish a model: check, upload, compile for each target, verify, sign.

    Example: foreshore publish mobilenet_v2.onnx --name vision --targets cpu-x86,jetson-orin
    """
    options = command.connection(context, url, token_file, as_json)

    def work() -> dict[str, Any]:
        login = command.login_of(options)
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
        files = key or [command.keys_folder() / "publisher.pem"]
        keys = command.load_keys(files, command.passphrase(passphrase_file))
        with login.connect() as client, PublishView(Console(stderr=options.as_json)) as view:
            desk = SigningDesk(client, files[0].parent / "trust", keys)
            result = Publisher(client, desk, view).publish(request)
            if desk.first_root_keys:
                view.say(f"this control plane's root is trusted from now on; its keys: {desk.first_root_keys}")
            view.finish()
        return _summary(result)

    command.run(options, work, _say_published)


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
        "is_released": result.is_released,
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
    done = "released" if result["is_released"] else "signed, others have to sign too:"
    typer.echo(f"{done} {result['name']} {result['version']}  {result['release'][:16]}")
    for artefact in result["artefacts"]:
        typer.echo(
            f"  {artefact['target']:<16} {artefact['precision']:<8} {artefact['runtime']:<18} "
            f"{artefact['size_bytes'] / (1 << 20):.1f} MiB"
        )


app = typer.Typer(no_args_is_help=True)
register(app)

if __name__ == "__main__":
    sys.exit(app())
