"""The catalogue on SQLite and on PostgreSQL behaves the same."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.orm import Session

from model_registry import catalogue
from model_registry.manifest import Release
from model_registry.sources import SourceFile
from model_registry.tables import Base
from tests.fakes.postgres import find_postgres, running_postgres
from wire.errors import ConflictError, InvalidInputError, NotFoundError

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    if find_postgres() is None:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        engine = create_engine(f"sqlite:///{tmp_path}/registry.db")
    else:
        engine = create_engine(request.getfixturevalue("postgres_url"))
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    catalogue.upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def release(version: str, sequence: int, **changes: object) -> Release:
    document = {
        "schema": "foreshore.release/1",
        "tenant": "demo",
        "name": "vision",
        "version": version,
        "sequence": sequence,
        "kind": "tensor",
        "source_format": "onnx",
        "source_digest": "5" * 64,
        "created_at": "2026-01-01T00:00:00Z",
        "artefacts": [
            {
                "target": target,
                "manifest": f"{sequence}{place}" * 32,
                "manifest_bytes": 100,
                "size_bytes": 1 << 33,
                "runtime": "onnxruntime",
                "precision": "int8",
                "deltas": [{"name": "delta-1", "base_manifest": "a" * 64, "index": "b" * 64, "wire_bytes": 5}],
            }
            for place, target in enumerate(("jetson-orin", "cpu-x86"))
        ],
        **changes,
    }
    return Release.model_validate(document)


def test_migrations_make_exactly_the_tables_that_the_code_declares(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": catalogue.VERSION_TABLE})
        assert compare_metadata(context, Base.metadata) == []


def test_upgrading_twice_changes_nothing_and_leaves_other_tables_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE somebody_elses (id INTEGER)"))
    catalogue.upgrade(engine)
    tables = set(inspect(engine).get_table_names())
    assert {"somebody_elses", "registry_version", "registry_release"} <= tables


def test_a_release_is_entered_once_and_read_back_as_it_was_listed(session: Session) -> None:
    first = release("1.0.0", 1)
    row = catalogue.add_release(session, first)
    session.commit()
    assert catalogue.add_release(session, first) is row
    session.expire_all()
    again = catalogue.get_release(session, first.digest)
    assert again.document == first.to_bytes()
    assert again.created_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert again.created_at.utcoffset() is not None
    assert [a.target for a in again.artefacts] == ["jetson-orin", "cpu-x86"]
    assert again.artefacts[0].size_bytes == 1 << 33
    assert catalogue.deltas_of(again.artefacts[0]) == first.artefacts[0].deltas


@pytest.mark.parametrize(
    "second",
    [
        release("1.0.0", 2),
        release("1.1.0", 1),
        release("0.9.0", 1, licence="MIT"),
        release("2", 2, kind="language"),
    ],
)
def test_a_release_that_does_not_follow_is_a_conflict(session: Session, second: Release) -> None:
    catalogue.add_release(session, release("1.0.0", 1))
    with pytest.raises(ConflictError):
        catalogue.add_release(session, second)


def test_a_version_taken_long_ago_is_a_conflict(session: Session) -> None:
    for sequence, version in ((1, "1.0.0"), (2, "2.0.0")):
        catalogue.add_release(session, release(version, sequence))
    session.commit()
    with pytest.raises(ConflictError, match=r"1\.0\.0"):
        catalogue.add_release(session, release("1.0.0", 3))
    session.rollback()
    assert catalogue.next_sequence(session, "demo", "vision") == 3


def test_models_are_listed_with_their_newest_release(session: Session) -> None:
    assert catalogue.list_models(session) == []
    assert catalogue.next_sequence(session, "demo", "vision") == 1
    catalogue.add_release(session, release("1.0.0", 1))
    catalogue.add_release(session, release("1.1.0", 4))
    catalogue.add_release(session, release("1.0.0", 1, tenant="other"))
    catalogue.add_release(session, release("1.0.0", 1, name="chat", kind="language"))
    names = [(m.tenant, m.name, m.num_releases, m.latest and m.latest.version) for m in catalogue.list_models(session)]
    assert names == [("demo", "chat", 1, "1.0.0"), ("demo", "vision", 2, "1.1.0"), ("other", "vision", 1, "1.0.0")]
    assert [m.name for m in catalogue.list_models(session, "other")] == ["vision"]
    assert len(catalogue.list_models(session, limit=1, offset=1)) == 1
    assert catalogue.get_model(session, "demo", "chat").kind == "language"
    assert catalogue.next_sequence(session, "demo", "vision") == 5


def test_versions_are_listed_newest_first(session: Session) -> None:
    for sequence, version in ((1, "0.9"), (2, "0.10")):
        catalogue.add_release(session, release(version, sequence))
    assert [row.version for row in catalogue.list_versions(session, "demo", "vision")] == ["0.10", "0.9"]
    assert catalogue.get_version(session, "demo", "vision", "0.9").sequence == 1
    with pytest.raises(NotFoundError, match=r"0\.10, 0\.9"):
        catalogue.get_version(session, "demo", "vision", "3")
    assert len(catalogue.list_releases(session, "demo")) == 2
    assert catalogue.list_releases(session, "nobody") == []


def test_what_is_not_there_is_not_found(session: Session) -> None:
    with pytest.raises(NotFoundError):
        catalogue.get_release(session, "0" * 64)
    with pytest.raises(NotFoundError):
        catalogue.get_model(session, "demo", "none")
    assert catalogue.find_latest(session, "demo", "none") is None
    assert catalogue.find_artefact(session, "demo", "0" * 64) is None


def test_a_device_gets_its_most_wanted_target_first(session: Session) -> None:
    row = catalogue.add_release(session, release("1", 1))
    assert [a.target for a in catalogue.artefacts_for(row, ["cpu-x86", "rtx", "jetson-orin"])] == [
        "cpu-x86",
        "jetson-orin",
    ]
    assert catalogue.artefacts_for(row, ["rtx"]) == []


def test_an_artefact_of_another_tenant_is_not_found(session: Session) -> None:
    catalogue.add_release(session, release("1", 1))
    session.flush()
    found = catalogue.find_artefact(session, "demo", "10" * 32)
    assert found is not None
    assert found.target == "jetson-orin"
    assert catalogue.find_artefact(session, "other", "10" * 32) is None


def test_earlier_manifests_are_the_newest_bases(session: Session) -> None:
    for sequence in (1, 2, 3):
        catalogue.add_release(session, release(str(sequence), sequence))
    session.flush()
    assert catalogue.earlier_manifests(session, "demo", "vision", "cpu-x86") == ["31" * 32, "21" * 32]


def test_a_source_is_remembered_and_holds_its_blobs(session: Session) -> None:
    files = [SourceFile("model.onnx", "a" * 64, 10), SourceFile("model.data", "b" * 64, 20)]
    row = catalogue.add_source(session, "demo", "5" * 64, "onnx", files, NOW)
    assert catalogue.add_source(session, "demo", "5" * 64, "onnx", files, NOW) is row
    assert catalogue.is_referenced(session, "a" * 64, tenant="demo")
    assert not catalogue.is_referenced(session, "a" * 64, tenant="other")
    session.commit()
    assert row.files[1] == {"path": "model.data", "digest": "b" * 64, "size_bytes": 20}


def test_a_blob_may_go_when_its_last_owner_lets_go(session: Session) -> None:
    catalogue.add_references(session, "demo", "m1", ["x", "y", "x"])
    catalogue.add_references(session, "demo", "m2", ["y"])
    catalogue.add_references(session, "demo", "m2", ["y", "z"])
    assert catalogue.unreferenced(session, ["w", "x", "y", "z"]) == ["w"]
    assert catalogue.remove_references(session, "demo", "m1") == ["x"]
    assert catalogue.is_referenced(session, "y", owner="m2")
    assert not catalogue.is_referenced(session, "y", owner="m1")


def test_a_time_without_a_zone_never_enters(session: Session) -> None:
    with pytest.raises(InvalidInputError):
        catalogue.add_release(session, release("1", 1, created_at="2026-01-01T00:00:00"))
    with pytest.raises(InvalidInputError):
        catalogue.add_release(session, release("1", 1, created_at="yesterday"))
