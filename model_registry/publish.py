"""The pipeline behind `foreshore publish`: check, hash, upload, compile, verify what came back, sign, hand in.

The control plane compiles; the publisher decides. Before signing, this side recomputes everything it can: the release
must name our tenant, model, version, targets and the source we hashed ourselves, and each artefact's manifest must hash
to its name, be for its target, descend from our source and have passed its gates. Nothing else is ever signed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from model_registry.client import ControlClient, JobState, Publication
from model_registry.manifest import GateResult, Kind, Manifest, Release, ReleaseArtefact, parse_release
from model_registry.sources import Source, SourceFile, hash_file, hash_source, recognise
from model_registry.transport import error_of
from wire.errors import ConflictError, ForeshoreError, GateFailedError, IntegrityError, InvalidInputError

MAX_GOLDEN_BYTES = 256 << 20
SIGN_TRIES = 3


@dataclass(frozen=True)
class PublishRequest:
    """What a person asked for. `tenant` and `version` None: whatever the control plane says is right."""

    path: Path
    name: str
    targets: tuple[str, ...]
    version: str | None = None
    kind: Kind | None = None
    licence: str = ""
    recipe: Mapping[str, Any] | None = None
    golden: Path | None = None
    vision: Mapping[str, Any] | None = None
    tenant: str | None = None


@dataclass(frozen=True)
class PublishResult:
    """What was published."""

    publication_id: str
    release: Release
    release_digest: str
    uploaded_bytes: int
    source_bytes: int
    manifests: Mapping[str, Manifest] = field(default_factory=dict)  # by target
    is_released: bool = True  # False: more publishers' keys have to sign


class ReleaseLister(Protocol):
    """Signs for a publisher; `trust.desk.SigningDesk` is one."""

    def list_release(self, release: Release) -> tuple[str, bytes]:
        """Role and signed metadata of the publisher's list with this release on it."""


class Observer(Protocol):
    """Hears what happens; a terminal or a log."""

    def begin(self, step: str, total: int) -> None:
        """A step with `total` units (bytes; 0: unknown) begins."""

    def advance(self, amount: int) -> None:
        """That many units of the step are done."""

    def say(self, text: str) -> None:
        """A line for people."""

    def show(self, publication: Publication) -> None:
        """The publication is now like this."""


class Publisher:
    """Publishes as one publisher to one control plane."""

    def __init__(self, client: ControlClient, lister: ReleaseLister, observer: Observer) -> None:
        self._client = client
        self._lister = lister
        self._observer = observer

    def publish(self, request: PublishRequest) -> PublishResult:
        """Run the pipeline to its end. Interrupted while compiling, it cancels the publication."""
        source = self._hash(recognise(request.path))
        golden = _hash_golden(request.golden)
        uploaded = self._upload(request, source, golden)
        publication = self._client.create_publication(_body(request, source, golden))
        self._observer.say(f"publication {publication.publication_id}")
        publication = self._wait(publication)
        release, manifests = self._check(request, source, publication)
        self._observer.begin("sign", 0)
        done = self._sign(publication.publication_id, release)
        if done.state not in ("released", "awaiting_signature"):
            raise ConflictError(f"the publication is {done.state} after signing", remedy="see: foreshore models")
        is_released = done.state == "released"
        return PublishResult(
            publication.publication_id, release, release.digest, uploaded, source.size_bytes, manifests, is_released
        )

    def _sign(self, publication_id: str, release: Release) -> Publication:
        """List the release; when somebody listed another one meanwhile, upon that newer list."""
        for attempt in range(SIGN_TRIES):
            role, metadata = self._lister.list_release(release)
            try:
                return self._client.sign_publication(publication_id, role, metadata)
            except ConflictError:
                if attempt == SIGN_TRIES - 1:
                    raise
                self._client.transport.pause(attempt)
        raise AssertionError("unreachable")

    def _hash(self, source: Source) -> Source:
        self._observer.say(source.summary)
        self._observer.begin("hash", source.size_bytes)
        return hash_source(source, self._observer.advance)

    def _upload(self, request: PublishRequest, source: Source, golden: SourceFile | None) -> int:
        uploaded = 0
        inputs = [(source.root / file.path, file) for file in source.files]
        inputs += [(request.golden, golden)] if request.golden and golden else []
        self._observer.begin("upload", sum(file.size_bytes for _, file in inputs))
        for path, file in inputs:
            if not self._client.has_blob(file.digest):
                self._client.put_blob_file(file.digest, path)
                uploaded += file.size_bytes
            self._observer.advance(file.size_bytes)
        return uploaded

    def _wait(self, publication: Publication) -> Publication:
        self._observer.begin("compile", 0)
        try:
            for latest in self._client.follow_publication(publication.publication_id):
                publication = latest
                self._observer.show(latest)
        except KeyboardInterrupt:
            self._client.cancel_publication(publication.publication_id)
            raise
        if publication.state in ("failed", "cancelled"):
            raise _why(publication)
        return publication

    def _check(
        self, request: PublishRequest, source: Source, publication: Publication
    ) -> tuple[Release, dict[str, Manifest]]:
        self._observer.begin("check", 0)
        if publication.release is None:
            raise ConflictError(
                f"publication {publication.publication_id} is {publication.state} and offers nothing to sign",
                remedy="somebody else may have signed it; see: foreshore models",
            )
        release = parse_release(publication.release)
        check_release(release, publication.release, request, source)
        manifests = {}
        for artefact in release.artefacts:
            manifest = self._client.get_manifest(artefact.manifest)
            check_artefact(release, artefact, manifest)
            manifests[artefact.target] = manifest
        return release, manifests


def check_release(release: Release, payload: bytes, request: PublishRequest, source: Source) -> None:
    """Raise `IntegrityError` unless the release is the one that was asked for, of the source that we hashed."""
    wanted: dict[str, tuple[object, object]] = {
        "byte form": (release.to_bytes() == payload, True),
        "name": (release.name, request.name),
        "source": (release.source_digest, source.digest),
        "source format": (release.source_format, source.format),
        "targets": (sorted(a.target for a in release.artefacts), sorted(request.targets)),
        "licence": (release.licence, request.licence),
        "kind": (release.kind, request.kind or source.kind),
    }
    if request.tenant is not None:
        wanted["tenant"] = (release.tenant, request.tenant)
    if request.version is not None:
        wanted["version"] = (release.version, request.version)
    for what, (found, asked) in wanted.items():
        if found != asked:
            raise IntegrityError(
                f"the release to sign has {what} {found!r}, asked was {asked!r}",
                remedy="do not sign; tell whoever runs the control plane",
            )


def check_artefact(release: Release, artefact: ReleaseArtefact, manifest: Manifest) -> None:
    """Raise unless the manifest is what the release says it is, descends from its source and passed its gates."""
    pairs: dict[str, tuple[object, object]] = {
        "name": (manifest.name, release.name),
        "kind": (manifest.kind, release.kind),
        "target": (manifest.target, artefact.target),
        "source": (manifest.source_digest, release.source_digest),
        "runtime": (manifest.runtime, artefact.runtime),
        "precision": (manifest.precision, artefact.precision),
        "size": (manifest.size_bytes, artefact.size_bytes),
        "manifest size": (len(manifest.to_bytes()), artefact.manifest_bytes),
    }
    for what, (found, stated) in pairs.items():
        if found != stated:
            raise IntegrityError(
                f"artefact for {artefact.target}: {what} is {found!r}, the release says {stated!r}",
                remedy="do not sign; tell whoever runs the control plane",
            )
    for gate in manifest.gates:
        held = gate.value <= gate.limit if gate.sense == "<=" else gate.value >= gate.limit
        if not (gate.passed and held):
            raise GateFailedError(
                f"artefact for {artefact.target}: {gate_text(gate)}",
                remedy="change the recipe and publish again",
            )


def _body(request: PublishRequest, source: Source, golden: SourceFile | None) -> dict[str, Any]:
    files = [{"path": f.path, "digest": f.digest, "size_bytes": f.size_bytes} for f in source.files]
    body: dict[str, Any] = {
        "name": request.name,
        "version": request.version,
        "kind": request.kind or source.kind,
        "licence": request.licence,
        "source": {"format": source.format, "files": files},
        "targets": list(request.targets),
        "recipe": dict(request.recipe) if request.recipe else None,
        "golden": golden.digest if golden else None,
        "vision": dict(request.vision) if request.vision else None,
    }
    return {name: value for name, value in body.items() if value is not None}


def _hash_golden(path: Path | None) -> SourceFile | None:
    if path is None:
        return None
    if not path.is_file():
        raise InvalidInputError(f"golden file {path} does not exist", remedy="give an .npz or .json file")
    size = path.stat().st_size
    if path.suffix not in (".npz", ".json") or size > MAX_GOLDEN_BYTES:
        raise InvalidInputError(
            f"golden file {path.name} ({size} bytes) is not accepted",
            remedy=f"an .npz (tensor models) or .json (language models) of at most {MAX_GOLDEN_BYTES} bytes",
        )
    if path.suffix == ".npz" and not zipfile.is_zipfile(path):
        raise InvalidInputError(f"golden file {path.name} is not an .npz", remedy="write it with numpy.savez")
    return SourceFile(path.name, hash_file(path), size)


def _why(publication: Publication) -> ForeshoreError:
    failed = [job for job in publication.jobs if job.state == "failed"]
    if publication.state == "cancelled":
        return ConflictError(f"publication {publication.publication_id} was cancelled", remedy="publish again")
    gate = next((job for job in failed if _failed_gates(job)), None)
    if gate is not None:
        return GateFailedError(
            f"{gate.target}: {'; '.join(_failed_gates(gate))}", remedy="change the recipe and publish again"
        )
    job = failed[0] if failed else None
    code = job.code if job else ""
    reason = (job.reason or job.message if job else publication.reason) or "no reason was given"
    kind = type(error_of(500, b'{"code": "%s"}' % code.encode(), ""))
    return kind(
        f"{job.target if job else publication.name}: {reason}",
        remedy="see the log: foreshore jobs" if kind is ForeshoreError else "publish again after a change",
        log=job.log[-4000:] if job else "",
    )


def _failed_gates(job: JobState) -> list[str]:
    return [gate_text(gate) for gate in job.gates if not gate.passed]


def gate_text(gate: GateResult) -> str:
    """What a gate measured and what it allows."""
    return f"{gate.name} is {gate.value:g}, the limit is {gate.sense} {gate.limit:g}"
