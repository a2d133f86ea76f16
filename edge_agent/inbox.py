"""Installing from a stick: `install` proves a bundle and puts it into the inbox; the running agent takes it from there.

The proof is the agent's own (`verify`), made on a copy of the device's metadata, so a bad bundle leaves no trace. The
agent makes it again before it acts: the inbox is a place, not a permission.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import Home, Identity
from edge_agent.verify import (
    DeviceTrust,
    check_fresh,
    open_desired,
    open_manifest,
    open_release,
    open_trust,
    recall_desired,
)
from model_registry.manifest import Chunk, Manifest
from model_registry.trust.bundle import Bundle, write_bundle
from model_registry.trust.clock import TrustedClock
from wire.errors import ForeshoreError, NotFoundError
from wire.messages import Desired, DesiredModel
from wire.topics import mqtt_user


@dataclass(frozen=True)
class Proven:
    """A bundle that may be installed: the assignment, and every file that it needs by name."""

    desired: Desired
    assignment: bytes
    files: tuple[str, ...]


def install(home: Home, path: Path, clock: TrustedClock | None = None) -> Desired:
    """Prove the bundle at `path` and hand it to the agent; raises with the reason if it must not be installed."""
    identity = home.identity()
    bundle = Bundle.open(path)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Home(Path(scratch))
            shutil.copytree(home.trust, copy.trust)
            trust = open_trust(copy, identity, clock=clock)
            proven = prove(bundle, trust, identity, _last_generation(home))
        _put(home, bundle, proven)
    finally:
        bundle.close()
    return proven.desired


def prove(bundle: Bundle, trust: DeviceTrust, identity: Identity, last_generation: int) -> Proven:
    """Follow the bundle's metadata and check all that its assignment for this device needs."""
    trust.refresh(bundle)
    device = mqtt_user(identity.tenant, identity.device_id)
    assignment = bundle.find_assignment(device)
    if assignment is None:
        raise NotFoundError(f"the bundle holds no assignment for {device}", remedy="foreshore bundle create --device")
    desired = open_desired(
        assignment,
        trust.director(),
        tenant=identity.tenant,
        device_id=identity.device_id,
        last_generation=last_generation,
    )
    check_fresh(desired, trust.now())
    files = [f"assignments/{device}"]
    for model in desired.models:
        manifest = _manifest(bundle, trust, identity, model)
        files += [f"releases/{model.release}", f"manifests/{model.manifest}", *_chunks(bundle, manifest)]
    return Proven(desired, assignment, tuple(dict.fromkeys(files)))


def find_chunk(bundle: Bundle, chunk: Chunk) -> bytes | None:
    """A chunk out of a bundle; a damaged one counts as absent, it will come another way."""
    try:
        return bundle.find("chunks", chunk.digest, chunk.size_bytes)
    except ForeshoreError:
        return None


def _manifest(bundle: Bundle, trust: DeviceTrust, identity: Identity, model: DesiredModel) -> Manifest:
    listed = trust.find_listed(model.name, model.release, bundle)
    _, artefact = open_release(
        _get(bundle, "releases", model.release, listed.length),
        listed,
        digest=model.release,
        tenant=identity.tenant,
        name=model.name,
        manifest=model.manifest,
        target=model.target,
    )
    data = _get(bundle, "manifests", model.manifest, artefact.manifest_bytes)
    return open_manifest(data, model.manifest, model.name, artefact)


def _chunks(bundle: Bundle, manifest: Manifest) -> Iterator[str]:
    for chunk in manifest.chunk_list():
        _get(bundle, "chunks", chunk.digest, chunk.size_bytes)
        yield f"chunks/{chunk.digest}"


def _get(bundle: Bundle, kind: str, digest: str, size_bytes: int) -> bytes:
    data = bundle.find(kind, digest, size_bytes)
    if data is None:
        raise NotFoundError(f"{kind}/{digest[:12]} is not in the bundle", remedy="make the bundle again")
    return data


def _put(home: Home, bundle: Bundle, proven: Proven) -> None:
    """Copy what is needed beside the inbox and move it in at once."""
    home.path.joinpath("inbox.new").mkdir(exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=home.path / "inbox.new")) / "bundle"
    names = [*bundle.names("metadata"), *proven.files]
    write_bundle(staging, ((name, data) for name in names if (data := bundle.read(name)) is not None))
    os.sync()
    if home.inbox.exists():
        home.inbox.rename(staging.parent / "old")
    staging.rename(home.inbox)
    shutil.rmtree(home.path / "inbox.new", ignore_errors=True)


def _last_generation(home: Home) -> int:
    if not home.desired_file.exists():
        return 0
    try:
        return recall_desired(home.desired_file.read_bytes()).generation
    except ForeshoreError:
        return 0
