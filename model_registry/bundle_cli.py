"""`foreshore bundle create`: an update for devices without a network, as a folder or a tar file for a stick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from tuf.api.metadata import Snapshot, Timestamp

from model_registry import command
from model_registry.client import ControlClient
from model_registry.command import AsJson, TokenFile, Url
from model_registry.manifest import MAX_RELEASE_BYTES, parse_release, sha256
from model_registry.trust.bundle import write_bundle
from model_registry.trust.client import MAX_ROOT_BYTES, MAX_ROOTS, MAX_SNAPSHOT_BYTES, MAX_TARGETS_BYTES
from model_registry.trust.trusted import read_metadata
from wire.errors import IntegrityError, NotFoundError, UnavailableError
from wire.frames import MAX_CHUNK_BYTES

app = typer.Typer(no_args_is_help=True, help="Updates on a stick.")


@app.callback()
def bundle() -> None:
    """Updates on a stick."""


@app.command("create")
def create(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="Where to write: NAME.tar, or a folder.")],
    device: Annotated[list[str], typer.Option(help="Device whose assignment goes along; may be repeated.")],
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Write what the devices are to install now, with all proofs. It is good for a week, as the timestamp in it is.

    Example: foreshore bundle create update.tar --device dock-camera-1   (there: foreshore-agent install update.tar)
    """
    options = command.connection(context, url, token_file, as_json)

    def work() -> dict[str, Any]:
        with command.login_of(options).connect() as client:
            size = write_bundle(path, _files(client, device))
        return {"path": str(path), "devices": device, "size_bytes": size}

    command.run(options, work, lambda result: typer.echo(f"wrote {result['path']}, {result['size_bytes']} bytes"))


def _files(client: ControlClient, devices: list[str]) -> Iterator[tuple[str, bytes]]:
    yield from _metadata(client)
    releases: dict[str, set[str]] = {}
    for device in devices:
        found = client.get(f"devices/{device}")
        name = f"{found['tenant']}.{device}"
        yield f"assignments/{name}", client.transport.fetch("GET", f"devices/{device}/desired", max_bytes=1 << 20)
        for model in found["desired"]["models"]:
            releases.setdefault(str(model["release"]), set()).add(str(model["manifest"]))
    yield from _content(client, releases)


def _metadata(client: ControlClient) -> Iterator[tuple[str, bytes]]:
    for version in range(1, MAX_ROOTS):
        data = client.find_metadata(f"{version}.root.json", MAX_ROOT_BYTES)
        if data is None:
            break
        yield f"metadata/{version}.root.json", data
    timestamp = _get(client, "timestamp.json", MAX_ROOT_BYTES)
    listed = read_metadata(Timestamp, timestamp).signed.snapshot_meta.version
    snapshot = _get(client, f"{listed}.snapshot.json", MAX_SNAPSHOT_BYTES)
    for name, meta in read_metadata(Snapshot, snapshot).signed.meta.items():
        yield f"metadata/{meta.version}.{name}", _get(client, f"{meta.version}.{name}", MAX_TARGETS_BYTES)
    yield f"metadata/{listed}.snapshot.json", snapshot
    yield "metadata/timestamp.json", timestamp


def _get(client: ControlClient, name: str, max_bytes: int) -> bytes:
    data = client.find_metadata(name, max_bytes)
    if data is None:
        raise UnavailableError(f"{name} is gone", remedy="the repository moved on: run this again")
    return data


def _content(client: ControlClient, releases: dict[str, set[str]]) -> Iterator[tuple[str, bytes]]:
    sent = set[str]()
    for digest, manifests in releases.items():
        data = client.transport.fetch("GET", f"releases/{digest}", max_bytes=MAX_RELEASE_BYTES)
        release = parse_release(data, expected_digest=digest)
        yield f"releases/{digest}", data
        known = {artefact.manifest for artefact in release.artefacts}
        if not manifests <= known:
            raise NotFoundError(f"release {digest[:12]} has no such artefact", remedy="start a rollout of another")
        for manifest_digest in manifests:
            manifest = client.get_manifest(manifest_digest)
            yield f"manifests/{manifest_digest}", manifest.to_bytes()
            for chunk in manifest.chunk_list():
                if chunk.digest in sent:
                    continue
                sent.add(chunk.digest)
                content = client.transport.fetch("GET", f"chunks/{chunk.digest}", max_bytes=MAX_CHUNK_BYTES)
                if sha256(content) != chunk.digest:
                    raise IntegrityError(f"chunk {chunk.digest[:12]} arrived damaged", remedy="run this again")
                yield f"chunks/{chunk.digest}", content


if __name__ == "__main__":
    sys.exit(app())
