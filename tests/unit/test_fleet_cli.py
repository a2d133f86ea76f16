"""The fleet commands against an HTTP server on loopback: what people read, what programs read, how refusals end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cloud.cli import app, exit_code
from cloud.control.audit_chain import GENESIS, export_lines, seal
from cloud.rollout_text import pace_text, parse_pace, parse_window, window_text
from tests.browser.conftest import serving
from tests.browser.sample import DIGEST, TOKEN, sample_app
from wire.errors import IntegrityError, InvalidInputError, NotAuthenticatedError

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    with serving(sample_app()) as url:
        environment = {"FORESHORE_URL": url, "FORESHORE_TOKEN_FILE": str(token), "XDG_CONFIG_HOME": str(tmp_path)}
        yield lambda *words: CliRunner().invoke(app, list(words), env=environment)


def test_a_command_without_a_verb_lists(run: Run) -> None:
    result = run("devices")
    assert result.exit_code == 0
    assert "dock-camera-1" in result.output


def test_json_is_the_apis_own_document(run: Run) -> None:
    assert json.loads(run("rollouts", "show", "ro-1", "--json").output)["release"] == DIGEST


def test_a_model_without_a_release_is_named(run: Run) -> None:
    assert isinstance(run("rollouts", "create", "nothing").exception, InvalidInputError)


def test_a_wave_that_is_no_wave_is_named(run: Run) -> None:
    assert isinstance(run("rollouts", "create", "vision@1.1.0", "--waves", "one").exception, InvalidInputError)


def test_an_exported_audit_file_is_verified_without_a_network(tmp_path: Path) -> None:
    entry = {"sequence": 1, "at": "2026-11-24T00:00:00+00:00", "tenant": "home", "actor": "anna", "action": "group.put",
             "subject": "docks", "details": {}, "previous": GENESIS}  # fmt: skip
    entry["digest"] = seal(entry)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(b"".join(export_lines("home", 1, str(entry["digest"]), [entry])))
    bad.write_bytes(good.read_bytes().replace(b"anna", b"anne"))
    assert "whole: 1 entries" in CliRunner().invoke(app, ["audit", "verify", str(good)]).output
    broken = CliRunner().invoke(app, ["audit", "verify", str(bad)]).exception
    assert isinstance(broken, IntegrityError)
    assert exit_code(broken) == 5
    other = CliRunner().invoke(app, ["audit", "verify", str(good), "--head", "0" * 64]).exception
    assert isinstance(other, IntegrityError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("02:00-04:00", {"opens_s": 7200, "lasts_s": 7200, "weekdays": []}),
        ("22:30-04:00 sun,mon", {"opens_s": 81_000, "lasts_s": 19_800, "weekdays": [0, 6]}),
        ("00:00-00:00", {"opens_s": 0, "lasts_s": 86_400, "weekdays": []}),
        ("", None),
    ],
)
def test_a_window_is_read_as_people_write_it_and_written_back(text: str, expected: dict[str, object] | None) -> None:
    assert parse_window(text) == expected
    assert parse_window(window_text(expected).replace(" UTC", "") if expected else "") == expected


@pytest.mark.parametrize("text", ["25:00-04:00", "2-4", "02:00-04:00 someday", "02:60-04:00"])
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_window(text)


def test_a_pace_is_read_as_people_write_it() -> None:
    assert parse_pace("10/min") == {"per_minute": 10.0}
    grown = {"per_minute": 10.0, "factor": 2.0, "every": 50, "max_per_minute": 200.0}
    assert parse_pace("10/min x2 every 50 max 200") == grown
    assert pace_text(grown) == "10/min x2 every 50 max 200"
    with pytest.raises(InvalidInputError):
        parse_pace("fast")


def test_without_a_login_the_remedy_is_to_log_in(tmp_path: Path) -> None:
    empty = {"XDG_CONFIG_HOME": str(tmp_path), "FORESHORE_URL": "", "FORESHORE_TOKEN_FILE": ""}
    result = CliRunner().invoke(app, ["devices"], env=empty)
    assert isinstance(result.exception, NotAuthenticatedError)
    assert "foreshore login" in str(result.exception)
