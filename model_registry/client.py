"""The control plane's API as Python calls: what the commands, the compile worker and the gateway use.

Thin on purpose: paths and bodies are docs/interfaces.md, behaviour on the wire is `transport`. Documents that callers
compute with come back as small frozen types, lists for people as plain JSON.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from model_registry.blobs import check_digest, copy_verified, file_pieces
from model_registry.manifest import (
    MAX_MANIFEST_BYTES,
    ArtefactFile,
    GateResult,
    Manifest,
    parse_manifest,
    sha256,
)
from model_registry.sse import ServerEvent
from model_registry.transport import MAX_TRIES, OPENED, Json, Transport
from wire.errors import IntegrityError, NotFoundError, TooLargeError, UnavailableError
from wire.frames import MAX_CHUNK_BYTES

LEASE_WAIT_S = 20.0

OnBytes = Callable[[int], None]
"""Hears of each piece of a transfer that is done, with its size; what it raises ends the transfer."""


def _ignore(num_bytes: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class JobState:
    """One target of a publication on its way. `progress` is 0 to 1; `code` and `reason` say why it failed."""

    job_id: str
    target: str
    state: str
    stage: str = ""
    progress: float = 0.0
    message: str = ""
    code: str = ""
    reason: str = ""
    gates: tuple[GateResult, ...] = ()
    log: str = ""


@dataclass(frozen=True)
class Publication:
    """A publication; `release` holds the bytes to sign once `state` is `awaiting_signature`."""

    publication_id: str
    state: str
    name: str = ""
    version: str = ""
    jobs: tuple[JobState, ...] = ()
    release: bytes | None = None
    reason: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether the control plane waits for us or is done."""
        return self.state in ("awaiting_signature", "released", "failed", "cancelled")


@dataclass(frozen=True)
class Lease:
    """A compile job that is ours while heartbeats arrive within `lease_s`."""

    job_id: str
    lease_id: str
    lease_s: float
    spec: Json


@dataclass(frozen=True)
class EngineLease:
    """An engine build that is ours while heartbeats arrive within `lease_s`, for at most `limit_s`."""

    build_id: str
    lease_id: str
    lease_s: float
    limit_s: float
    tenant: str
    model: str
    manifest: str
    hardware_key: str


@dataclass(frozen=True)
class EngineOffer:
    """An engine's document, unproven until its digest is found in a publisher's list; `lease_id`: prove it first."""

    build_id: str
    document: bytes
    lease_id: str | None
    lease_s: float


class ControlClient:
    """A connection to one control plane with one token. Use as a context, or call `close`."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go."""
        self.transport.close()

    def get(self, path: str, **params: Any) -> Any:
        """GET below /api/v1; the answer's JSON."""
        given = {name: value for name, value in params.items() if value is not None}
        return self.transport.call("GET", path, params=given or None)

    def post(self, path: str, body: Json | None = None) -> Any:
        """POST JSON below /api/v1; the answer's JSON."""
        return self.transport.call("POST", path, body=body or {})

    def put(self, path: str, body: Json) -> Any:
        """PUT JSON below /api/v1; the answer's JSON."""
        return self.transport.call("PUT", path, body=body)

    def delete(self, path: str) -> Any:
        """DELETE below /api/v1."""
        return self.transport.call("DELETE", path)

    # blobs

    def has_blob(self, digest: str) -> bool:
        """Whether the control plane holds the blob."""
        try:
            self.transport.fetch("HEAD", f"blobs/{check_digest(digest)}")
        except NotFoundError:
            return False
        return True

    def put_blob(self, data: bytes) -> str:
        """Store `data` unless it is there; return its digest."""
        digest = sha256(data)
        if not self.has_blob(digest):
            self.transport.fetch("PUT", f"blobs/{digest}", content=data, headers=_OCTETS)
        return digest

    def put_blob_file(self, digest: str, path: Path) -> None:
        """Store the file at `path`, which hashes to `digest`, without holding it in memory."""
        size = str(path.stat().st_size)
        headers = {**_OCTETS, "content-length": size}
        self.transport.fetch(
            "PUT", f"blobs/{check_digest(digest)}", content=lambda: file_pieces(path), headers=headers, timeout_s=300.0
        )

    def get_blob(self, digest: str, *, max_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
        """The blob, verified."""
        data = self.transport.fetch("GET", f"blobs/{check_digest(digest)}", max_bytes=max_bytes)
        return _verified(digest, data)

    def get_chunk(self, digest: str) -> bytes:
        """A chunk, verified."""
        data = self.transport.fetch("GET", f"chunks/{check_digest(digest)}", max_bytes=MAX_CHUNK_BYTES)
        return _verified(digest, data)

    def get_manifest(self, digest: str) -> Manifest:
        """A manifest, verified and parsed."""
        data = self.transport.fetch("GET", f"blobs/{check_digest(digest)}", max_bytes=MAX_MANIFEST_BYTES)
        return parse_manifest(data, expected_digest=digest)

    def download_blob(self, digest: str, path: Path, *, max_bytes: int, on_bytes: OnBytes = _ignore) -> int:
        """Write the blob to `path`, verified; what arrived before a break is kept and the rest asked for.

        Returns the size. `path` exists afterwards only if every byte is right.
        """
        part = path.with_name(f".{path.name}.part")
        try:
            for attempt in range(MAX_TRIES):
                try:
                    self._download_rest(digest, part, max_bytes, on_bytes)
                    break
                except UnavailableError:
                    if attempt == MAX_TRIES - 1:
                        raise
                    self.transport.pause(attempt)
            size = copy_verified(digest, file_pieces(part), lambda _: None, max_bytes)
            part.replace(path)
            return size
        finally:
            part.unlink(missing_ok=True)

    def _download_rest(self, digest: str, part: Path, max_bytes: int, on_bytes: OnBytes) -> None:
        held = part.stat().st_size if part.exists() else 0
        headers = {"range": f"bytes={held}-"} if held else {}
        size = held
        with part.open("ab") as file:
            for piece in self.transport.stream(f"blobs/{check_digest(digest)}", headers=headers):
                size += len(piece)
                if size > max_bytes:
                    raise IntegrityError(f"blob {digest[:12]} has over {max_bytes} bytes", remedy="publish it again")
                file.write(piece)
                on_bytes(len(piece))

    def upload_artefact(
        self, root: Path, files: Sequence[ArtefactFile], manifest: Manifest, on_bytes: OnBytes = _ignore
    ) -> str:
        """Store the chunks that are missing, then the manifest; return the manifest's digest."""
        for file in files:
            self._upload_chunks(root / file.path, file, on_bytes)
        return self.put_blob(manifest.to_bytes())

    def _upload_chunks(self, path: Path, file: ArtefactFile, on_bytes: OnBytes) -> None:
        with path.open("rb") as stream:
            for chunk in file.chunks:
                data = stream.read(chunk.size_bytes)
                if self.put_blob(data) != chunk.digest:
                    raise IntegrityError(f"{file.path} changed while it was uploaded", remedy="build it again")
                on_bytes(len(data))

    # publications

    def create_publication(self, body: Json) -> Publication:
        """Ask for a model to be compiled; see `publish.PublishRequest`."""
        return publication_of(self.post("publications", body))

    def get_publication(self, publication_id: str) -> Publication:
        """Where a publication is."""
        return publication_of(self.get(f"publications/{publication_id}"))

    def follow_publication(self, publication_id: str) -> Iterator[Publication]:
        """Yield the publication now and after every event until it is settled.

        Events wake us, the state is always read: a lost event costs a pause, never a wrong answer. Without a working
        event stream it polls, each time after a growing pause of at most eight seconds.
        """
        attempt = 0
        while True:
            publication = self.get_publication(publication_id)
            yield publication
            if publication.is_settled:
                return
            try:
                for event in self.transport.events(f"publications/{publication_id}/events"):
                    attempt = attempt if event is OPENED else 0
                    publication = self.get_publication(publication_id)
                    yield publication
                    if publication.is_settled:
                        return
            except (UnavailableError, NotFoundError, TooLargeError):
                pass  # no event stream; the next look tells whether the server is gone
            self.transport.pause(attempt)
            attempt = min(attempt + 1, MAX_TRIES)

    def sign_publication(self, publication_id: str, role: str, metadata: bytes) -> Publication:
        """Hand in the publisher's metadata that lists the release; once more does no harm if an answer was lost."""
        body = {"role": role, "metadata": base64.b64encode(metadata).decode()}
        path = f"publications/{publication_id}/sign"
        return publication_of(self.transport.call("POST", path, body=body, is_repeatable=True))

    def cancel_publication(self, publication_id: str) -> None:
        """Stop the jobs of a publication."""
        self.post(f"publications/{publication_id}/cancel")

    # engines

    def sign_engine(self, build_id: str, role: str, metadata: bytes) -> dict[str, Any]:
        """Hand in the publisher's metadata that lists an engine."""
        body: Json = {"role": role, "metadata": base64.b64encode(metadata).decode()}
        return dict(self.transport.call("POST", f"engine-builds/{build_id}/sign", body=body))

    def lease_engine(self, keys: Sequence[str] = ()) -> EngineLease | None:
        """An engine build that is ours now; a device's key is known, a builder names those it has."""
        answer = self.transport.call("POST", "engine-builds/lease", body={"keys": list(keys)})
        return None if answer is None else EngineLease(**answer)

    def keep_engine(self, build_id: str, lease_id: str) -> None:
        """Keep a lease to build or to prove; `ConflictError` when it is lost."""
        body = {"lease_id": lease_id}
        self.transport.call("POST", f"engine-builds/{build_id}/heartbeat", body=body, is_repeatable=True)

    def hand_in_engine(self, lease: EngineLease, path: Path) -> None:
        """Upload the engine at `path` and end the lease with it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        headers = {**_OCTETS, "content-length": str(path.stat().st_size)}
        self.transport.fetch(
            "PUT", f"engine-builds/{lease.build_id}/engine/{digest}", content=lambda: file_pieces(path),
            headers=headers, params={"lease_id": lease.lease_id}, timeout_s=300.0,
        )  # fmt: skip
        body = {"lease_id": lease.lease_id, "hardware_key": lease.hardware_key, "engine": digest}
        self.transport.call("POST", f"engine-builds/{lease.build_id}/complete", body=body)

    def fail_engine(self, lease: EngineLease, code: str, reason: str) -> None:
        """End the lease with why there is no engine."""
        body = {"lease_id": lease.lease_id, "code": code, "reason": reason[:2000]}
        self.transport.call("POST", f"engine-builds/{lease.build_id}/fail", body=body)

    def find_engine(self, manifest: str) -> EngineOffer | None:
        """The signed engine of an artefact for the calling device's key."""
        answer = self.transport.call("POST", f"device/engines/{manifest}", is_repeatable=True)
        if answer is None:
            return None
        document = base64.b64decode(answer["document"])
        return EngineOffer(str(answer["build_id"]), document, answer["lease_id"], float(answer["lease_s"]))

    def prove_engine(self, offer: EngineOffer, code: str | None, reason: str = "") -> None:
        """Say how the golden inputs went; does nothing where nobody asked."""
        if offer.lease_id is not None:
            body = {"lease_id": offer.lease_id, "code": code, "reason": reason[:2000]}
            self.transport.call("POST", f"engine-builds/{offer.build_id}/prove", body=body)

    # trust

    def get_trust(self) -> Json:
        """Roles, what waits for signatures, the newest online keys."""
        return dict(self.get("trust"))

    def submit_metadata(self, role: str, metadata: bytes) -> Json:
        """Hand in a signed document of root, targets or a publisher."""
        return dict(self.post("trust/metadata", {"role": role, "metadata": base64.b64encode(metadata).decode()}))

    def find_metadata(self, name: str, max_bytes: int) -> bytes | None:
        """A file of the TUF repository, unverified; None when there is none of this name."""
        try:
            return self.transport.fetch("GET", f"trust/metadata/{quote(name, safe='')}", max_bytes=max_bytes)
        except NotFoundError:
            return None

    # compile jobs

    def lease_job(self, worker_id: str, kinds: Iterable[str], targets: Iterable[str]) -> Lease | None:
        """Wait up to 20 s for a job; None when there is none."""
        body = {"worker_id": worker_id, "kinds": list(kinds), "targets": list(targets)}
        answer = self.transport.call("POST", "jobs/lease", body=body, timeout_s=LEASE_WAIT_S + 15)
        if not answer:
            return None
        return Lease(str(answer["job_id"]), str(answer["lease_id"]), float(answer["lease_s"]), dict(answer["spec"]))

    def heartbeat(
        self, lease: Lease, *, stage: str, progress: float, message: str = "", log: str | None = None
    ) -> bool:
        """Say that the job goes on; True when it is to be cancelled. `ConflictError` when the lease is lost."""
        body: Json = {"lease_id": lease.lease_id, "stage": stage, "progress": progress, "message": message}
        answer = self.post(f"jobs/{lease.job_id}/heartbeat", body if log is None else {**body, "log": log})
        return bool((answer or {}).get("cancel"))

    def complete_job(self, lease: Lease, manifest: str, *, stages: Any = None) -> None:
        """Hand in the digest of the uploaded manifest."""
        body: Json = {"lease_id": lease.lease_id, "manifest": manifest}
        body = body if stages is None else {**body, "stages": stages}
        self.transport.call("POST", f"jobs/{lease.job_id}/complete", body=body, is_repeatable=True)

    def fail_job(self, lease: Lease, *, code: str, reason: str, log: str) -> None:
        """Say why the job failed."""
        self.post(f"jobs/{lease.job_id}/fail", {"lease_id": lease.lease_id, "code": code, "reason": reason, "log": log})

    # the rest of the platform

    def introspect(self, token: str) -> Json:
        """Whose token this is: `{active, tenant, subject, role}`."""
        return dict(self.post("tokens/introspect", {"token": token}))

    def record_decision(self, record: Json) -> None:
        """Keep a decision record."""
        self.post("decisions", record)

    def events(self, *, last_event_id: str | None = None) -> Iterator[ServerEvent]:
        """The control plane's live events, reconnecting for ever with the last id it saw."""
        attempt = 0
        while True:
            try:
                for event in self.transport.events("events", last_event_id=last_event_id):
                    attempt, last_event_id = 0, event.event_id or last_event_id
                    if event is not OPENED:
                        yield event
            except UnavailableError:
                if attempt >= MAX_TRIES:
                    raise
            self.transport.pause(attempt)
            attempt += 1


_OCTETS = {"content-type": "application/octet-stream"}


def connect(
    url: str, token: str | None = None, *, ca_file: str | None = None, tls: ssl.SSLContext | None = None
) -> ControlClient:
    """A client for the control plane at `url`; `tls` carries a device's certificate."""
    return ControlClient(Transport(url, token, ca_file=ca_file, tls=tls))


def publication_of(document: Json) -> Publication:
    """Read a publication document; unknown fields are ignored, as a newer server may send them."""
    try:
        release = document.get("release")
        return Publication(
            publication_id=str(document["publication_id"]),
            state=str(document.get("state", "compiling")),
            name=str(document.get("name") or ""),
            version=str(document.get("version") or ""),
            jobs=tuple(_job_of(job) for job in document.get("jobs") or ()),
            release=base64.b64decode(release, validate=True) if release else None,
            reason=str(document.get("reason") or ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise UnavailableError(f"the server's publication is malformed: {error}", remedy="update both sides") from error


def _job_of(document: Json) -> JobState:
    return JobState(
        job_id=str(document["job_id"]),
        target=str(document.get("target") or ""),
        state=str(document.get("state") or "queued"),
        stage=str(document.get("stage") or ""),
        progress=float(document.get("progress") or 0.0),
        message=str(document.get("message") or ""),
        code=str(document.get("code") or ""),
        reason=str(document.get("reason") or ""),
        gates=tuple(GateResult.model_validate(gate) for gate in document.get("gates") or ()),
        log=str(document.get("log") or ""),
    )


def _verified(digest: str, data: bytes) -> bytes:
    if sha256(data) != digest:
        raise IntegrityError(f"the server's blob does not hash to {digest[:12]}", remedy="ask again")
    return data
