"""The language of group filters: what it means, as the database answers it, and what it says about wrong text."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud.control.database import Database
from cloud.control.device_facts import store_facts, version_number
from cloud.control.device_filter import All, Expression, Not, Term, condition, parse_filter
from cloud.control.device_filter import Any as AnyOf
from cloud.control.events import EventBus
from cloud.control.tables import Device
from tests.fakes.postgres import find_postgres, running_postgres
from wire.errors import InvalidInputError

FLEET: dict[str, dict[str, Any]] = {
    "dock-1": {"profile": "jetson-orin", "targets": ["jetson-orin", "cpu-x86"], "memory_bytes": 8 << 30,
               "agent": "0.9.2", "labels": {"site": "hamburg", "floor": "3"}, "online": True},
    "dock-2": {"profile": "jetson-nano", "targets": ["cpu-x86"], "memory_bytes": 4 << 30, "agent": "0.10.0",
               "labels": {"site": "lab"}, "online": False},
    "till_1": {"profile": "cpu-small", "targets": ["cpu-x86"], "memory_bytes": 2 << 30, "agent": "1.0.0",
               "labels": {"floor": "12"}, "online": True},
    "tillx1": {"profile": "cpu-small", "targets": [], "memory_bytes": 0, "agent": None, "labels": {}, "online": False},
}  # fmt: skip


def fill(database: Database) -> None:
    with database.write() as session:
        for name, facts in FLEET.items():
            models = [{"name": "vision", "active_version": "1.0.0"}] if name == "dock-1" else []
            device = Device(
                tenant="home", device_id=name, enrolled_at=datetime.now(UTC), certificate_serial="1",
                online=facts["online"],
                hardware={key: facts[key] for key in ("profile", "targets", "memory_bytes")}, labels=facts["labels"],
                desired_models=[], attempts={},
                reported={"agent_version": facts["agent"], "models": models} if facts["agent"] else None,
            )  # fmt: skip
            session.add(device)
            store_facts(session, device, set())


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path_factory.mktemp('filter') / 'c.db'}", EventBus())
        database.upgrade()
        fill(database)
        with database.read() as opened:
            yield opened
        database.dispose()
        return
    if find_postgres() is None:
        pytest.skip("PostgreSQL is not installed")
    with running_postgres() as url:
        database = Database(url, EventBus())
        database.upgrade()
        fill(database)
        with database.read() as opened:
            yield opened
        database.dispose()


def ask(session: Session, text: str) -> list[str]:
    query = select(Device.device_id).where(condition(parse_filter(text))).order_by(Device.device_id)
    return list(session.scalars(query))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("profile = jetson*", ["dock-1", "dock-2"]),
        ("profile=jetson* and online=true", ["dock-1"]),
        ("target = jetson-orin or memory < 3GiB", ["dock-1", "till_1"]),
        ("not (label.site = lab or memory <= 2GiB)", ["dock-1", "tillx1"]),
        ("label.site != lab", ["dock-1", "till_1", "tillx1"]),
        ("label.floor >= 4", ["till_1"]),
        ("label.floor = *", ["dock-1", "till_1"]),
        ("agent >= 0.10", ["dock-2", "till_1"]),
        ("agent = 0.9.2", ["dock-1"]),
        ("device in (dock-1, till*)", ["dock-1", "till_1", "tillx1"]),
        ("device not in (dock-*)", ["till_1", "tillx1"]),
        ("device = till_*", ["till_1"]),
        ("device = *_1", ["till_1"]),
        ("profile = JETSON*", []),
        ('profile = "cpu-small" and not target = cpu-x86', ["tillx1"]),
        ("runs = vision@1.0*", ["dock-1"]),
        ("memory = 8GiB", ["dock-1"]),
        ("online = false or online = true", ["dock-1", "dock-2", "till_1", "tillx1"]),
        ("profile = x and profile = y or device = dock-2", ["dock-2"]),
    ],
)
def test_the_database_answers_what_the_filter_says(session: Session, text: str, expected: list[str]) -> None:
    assert ask(session, text) == expected


@pytest.mark.parametrize(
    ("text", "position", "what"),
    [
        ("profil = x", 1, "expected a field"),
        ("profile jetson", 9, "expected ="),
        ("profile = ", 11, "expected a value"),
        ("(profile = x", 13, "expected '\\)'"),
        ("profile = x y", 13, "expected 'and', 'or' or the end"),
        ("profile < x", 9, "profile has no order"),
        ("memory > much", 10, "no number"),
        ("online = maybe", 10, "true or = false"),
        ("device in (a b)", 14, "expected '\\)'"),
        ("device in ()", 12, "expected a value"),
        ("device = a and", 15, "expected a field"),
        ('device = "a', 10, "quotation that does not end"),
        ("device ! a", 8, "means nothing"),
        ("not " * 30 + "device = a", 85, "nested deeper"),
    ],
)
def test_a_wrong_filter_is_refused_with_the_place_where_it_goes_wrong(text: str, position: int, what: str) -> None:
    with pytest.raises(InvalidInputError, match=what) as refused:
        parse_filter(text)
    assert refused.value.details["position"] == position


words = st.sampled_from(["jetson*", "lab", "3", "true", "a b", "x(y", "and"])
terms = st.builds(Term, st.sampled_from(["profile", "label.site", "device"]), st.just("="), words)
expressions: st.SearchStrategy[Expression] = st.recursive(
    terms,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(All, st.lists(inner, min_size=2, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=8,
)


def written(expression: Expression) -> str:
    match expression:
        case Not(part):
            return f"not ({written(part)})"
        case All(parts):
            return " and ".join(f"({written(part)})" for part in parts)
        case AnyOf(parts):
            return " or ".join(f"({written(part)})" for part in parts)
        case Term(field, op, value):
            return f'{field} {op} "{value}"'


@given(expressions)
def test_what_is_written_is_what_is_read(expression: Expression) -> None:
    assert parse_filter(written(expression)) == expression


@settings(max_examples=500)
@given(st.text(st.sampled_from('profile online=<>!()," *andornti\t.'), max_size=60))
def test_any_text_is_read_or_refused_with_a_place(text: str) -> None:
    try:
        condition(parse_filter(text))
    except InvalidInputError as error:
        position = error.details.get("position")
    else:
        return
    assert (position is None) == (not text.strip())
    assert position is None or 1 <= position <= len(text) + 1


def test_versions_compare_as_versions() -> None:
    texts = ["0.9.2", "0.10.0", "0.10.1", "1", "1.0.1", "12.0"]
    numbers = [version_number(text) for text in texts]
    assert numbers == sorted(n for n in numbers if n is not None)
    assert version_number("simulated") is None
