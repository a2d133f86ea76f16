"""What exists: questions to and changes of the catalogue, each inside the caller's session and transaction.

Nothing here commits; after an error the caller rolls its transaction back. A release enters only once a
publisher's metadata lists it, which the caller has verified; it never changes afterwards, and its sequence is higher
than that of every release of the name before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, func, select, text
from sqlalchemy.exc import IntegrityError as DatabaseIntegrityError
from sqlalchemy.orm import Session

from model_registry.manifest import DeltaEncoding, Release
from model_registry.sources import SourceFile
from model_registry.tables import ArtefactRow, BlobReferenceRow, ModelRow, ReleaseRow, SourceRow
from wire.errors import ConflictError, InvalidInputError, NotFoundError

VERSION_TABLE = "registry_version"
_UPGRADE_LOCK = 0x464F5245  # an advisory lock of PostgreSQL: two processes may start at once
_BATCH = 500


@dataclass(frozen=True)
class ModelSummary:
    """A model with its newest release (None before the first)."""

    tenant: str
    name: str
    kind: str
    created_at: datetime
    num_releases: int
    latest: ReleaseRow | None


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the registry's tables to the newest version; safe when several processes start together."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})"))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def add_release(session: Session, release: Release) -> ReleaseRow:
    """Enter a listed release; entering the same one again changes nothing.

    Raises `ConflictError` when the version is taken, the sequence is not the highest, or the kind changed.
    """
    known = session.get(ReleaseRow, release.digest)
    if known is not None:
        return known
    _check_follows(session, release)
    row = ReleaseRow(
        digest=release.digest,
        tenant=release.tenant,
        name=release.name,
        version=release.version,
        sequence=release.sequence,
        kind=release.kind,
        licence=release.licence,
        source_format=release.source_format,
        source_digest=release.source_digest,
        created_at=_instant(release.created_at),
        document=release.to_bytes(),
        artefacts=[_artefact_row(release, place) for place in range(len(release.artefacts))],
    )
    try:
        session.add(row)
        session.flush()
    except DatabaseIntegrityError as error:
        raise _taken(release) from error
    return row


def get_release(session: Session, digest: str) -> ReleaseRow:
    """The release with this digest; `NotFoundError` otherwise."""
    row = session.get(ReleaseRow, digest)
    if row is None:
        raise NotFoundError(f"release {digest[:12]} is not in the catalogue", remedy="see: foreshore models")
    return row


def get_version(session: Session, tenant: str, name: str, version: str) -> ReleaseRow:
    """The release of a name by its version; `NotFoundError` names the versions that exist."""
    row = session.scalar(select(ReleaseRow).filter_by(tenant=tenant, name=name, version=version))
    if row is None:
        known = ", ".join(row.version for row in list_versions(session, tenant, name, limit=10)) or "none"
        raise NotFoundError(f"model {name!r} has no version {version!r}", remedy=f"versions: {known}")
    return row


def find_latest(session: Session, tenant: str, name: str) -> ReleaseRow | None:
    """The release with the highest sequence."""
    query = select(ReleaseRow).filter_by(tenant=tenant, name=name).order_by(ReleaseRow.sequence.desc())
    return session.scalar(query.limit(1))


def next_sequence(session: Session, tenant: str, name: str) -> int:
    """The sequence that the next release of a name should carry."""
    latest = session.scalar(select(func.max(ReleaseRow.sequence)).filter_by(tenant=tenant, name=name))
    return (latest or 0) + 1


def list_models(
    session: Session, tenant: str | None = None, *, limit: int = 1000, offset: int = 0
) -> list[ModelSummary]:
    """Models by tenant and name, each with its newest release. `tenant` None: of all tenants."""
    query = select(ModelRow).order_by(ModelRow.tenant, ModelRow.name).limit(limit).offset(offset)
    models = session.scalars(query if tenant is None else query.filter_by(tenant=tenant))
    return [_summary(session, model) for model in models]


def get_model(session: Session, tenant: str, name: str) -> ModelSummary:
    """One model with its newest release; `NotFoundError` otherwise."""
    model = session.get(ModelRow, (tenant, name))
    if model is None:
        raise NotFoundError(f"model {name!r} does not exist", remedy="see: foreshore models")
    return _summary(session, model)


def list_versions(
    session: Session, tenant: str, name: str, *, limit: int = 1000, offset: int = 0
) -> Sequence[ReleaseRow]:
    """Releases of a name, newest first."""
    query = select(ReleaseRow).filter_by(tenant=tenant, name=name).order_by(ReleaseRow.sequence.desc())
    return session.scalars(query.limit(limit).offset(offset)).all()


def list_releases(
    session: Session, tenant: str | None = None, *, limit: int = 1000, offset: int = 0
) -> Sequence[ReleaseRow]:
    """Releases of all names, newest first."""
    query = select(ReleaseRow).order_by(ReleaseRow.created_at.desc(), ReleaseRow.digest).limit(limit).offset(offset)
    return session.scalars(query if tenant is None else query.filter_by(tenant=tenant)).all()


def artefacts_for(release: ReleaseRow, targets: Sequence[str]) -> list[ArtefactRow]:
    """The artefacts of a release that a device with these targets can run, most wanted target first."""
    by_target = {artefact.target: artefact for artefact in release.artefacts}
    return [by_target[target] for target in targets if target in by_target]


def find_artefact(session: Session, tenant: str, manifest: str) -> ArtefactRow | None:
    """An artefact of the tenant by its manifest, of whichever release names it first."""
    query = select(ArtefactRow).join(ReleaseRow).where(ArtefactRow.manifest == manifest, ReleaseRow.tenant == tenant)
    return session.scalar(query.order_by(ReleaseRow.sequence).limit(1))


def earlier_manifests(session: Session, tenant: str, name: str, target: str, *, limit: int = 2) -> list[str]:
    """Manifests of the newest releases of a name for a target: the bases worth a delta, newest first, each once."""
    query = (
        select(ArtefactRow.manifest)
        .join(ReleaseRow)
        .where(ReleaseRow.tenant == tenant, ReleaseRow.name == name, ArtefactRow.target == target)
        .order_by(ReleaseRow.sequence.desc())
        .limit(4 * limit)
    )
    return list(dict.fromkeys(session.scalars(query)))[:limit]


def deltas_of(artefact: ArtefactRow) -> list[DeltaEncoding]:
    """The artefact's delta encodings as the publisher signed them."""
    return [DeltaEncoding.model_validate(document) for document in artefact.deltas]


def add_source(
    session: Session, tenant: str, digest: str, source_format: str, files: Sequence[SourceFile], at: datetime
) -> SourceRow:
    """Remember what was uploaded for a publication; the same source again changes nothing."""
    known = session.get(SourceRow, (tenant, digest))
    if known is not None:
        return known
    documents = [{"path": f.path, "digest": f.digest, "size_bytes": f.size_bytes} for f in files]
    row = SourceRow(tenant=tenant, digest=digest, format=source_format, files=documents, created_at=at)
    session.add(row)
    add_references(session, tenant, digest, [file.digest for file in files])
    return row


def add_references(session: Session, tenant: str, owner: str, blobs: Iterable[str]) -> None:
    """Say that `owner` needs these blobs; known references stay."""
    known = set(session.scalars(select(BlobReferenceRow.blob).filter_by(tenant=tenant, owner=owner)))
    fresh = dict.fromkeys(blob for blob in blobs if blob not in known)
    session.add_all(BlobReferenceRow(tenant=tenant, owner=owner, blob=blob) for blob in fresh)
    session.flush()


def remove_references(session: Session, tenant: str, owner: str) -> list[str]:
    """Forget what `owner` needs; returns the blobs that nobody needs now."""
    rows = session.scalars(select(BlobReferenceRow).filter_by(tenant=tenant, owner=owner)).all()
    for row in rows:
        session.delete(row)
    session.flush()
    return [row.blob for row in rows if not is_referenced(session, row.blob)]


def is_referenced(session: Session, blob: str, *, tenant: str | None = None, owner: str | None = None) -> bool:
    """Whether anything (of the tenant, or that owner) needs the blob."""
    query = select(BlobReferenceRow.blob).where(BlobReferenceRow.blob == blob).limit(1)
    query = query if tenant is None else query.where(BlobReferenceRow.tenant == tenant)
    query = query if owner is None else query.where(BlobReferenceRow.owner == owner)
    return session.scalar(query) is not None


def unreferenced(session: Session, blobs: Iterable[str]) -> list[str]:
    """Those of `blobs` that nothing needs, in order."""
    wanted, needed = list(blobs), set[str]()
    for start in range(0, len(wanted), _BATCH):
        part = wanted[start : start + _BATCH]
        needed |= set(session.scalars(select(BlobReferenceRow.blob).where(BlobReferenceRow.blob.in_(part))))
    return [blob for blob in wanted if blob not in needed]


def _check_follows(session: Session, release: Release) -> None:
    model = session.get(ModelRow, (release.tenant, release.name))
    if model is None:
        created_at = _instant(release.created_at)
        session.add(ModelRow(tenant=release.tenant, name=release.name, kind=release.kind, created_at=created_at))
        return
    if model.kind != release.kind:
        raise ConflictError(
            f"model {release.name!r} is a {model.kind} model, this release is {release.kind}",
            remedy="publish it under another name",
        )
    latest = find_latest(session, release.tenant, release.name)
    if latest is not None and (latest.sequence >= release.sequence or latest.version == release.version):
        raise _taken(release)


def _taken(release: Release) -> ConflictError:
    return ConflictError(
        f"{release.name} {release.version} (sequence {release.sequence}) does not follow what is in the catalogue",
        remedy="choose a new version and publish again",
    )


def _artefact_row(release: Release, place: int) -> ArtefactRow:
    artefact = release.artefacts[place]
    return ArtefactRow(
        target=artefact.target,
        place=place,
        manifest=artefact.manifest,
        manifest_bytes=artefact.manifest_bytes,
        size_bytes=artefact.size_bytes,
        runtime=artefact.runtime,
        precision=artefact.precision,
        deltas=[delta.model_dump(mode="json") for delta in artefact.deltas],
    )


def _summary(session: Session, model: ModelRow) -> ModelSummary:
    count = select(func.count()).select_from(ReleaseRow).filter_by(tenant=model.tenant, name=model.name)
    latest = find_latest(session, model.tenant, model.name)
    num_releases = session.scalar(count) or 0
    return ModelSummary(model.tenant, model.name, model.kind, model.created_at, num_releases, latest)


def _instant(text: str) -> datetime:
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInputError(f"time {text!r} is not ISO 8601", remedy="for example 2026-01-31T12:00:00Z") from error
    if instant.tzinfo is None:
        raise InvalidInputError(f"time {text!r} has no zone", remedy="give UTC with a Z")
    return instant
