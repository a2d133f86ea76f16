"""The fleet commands against an HTTP server on loopback: what people read, what programs read, how refusals end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cloud.fleet_cli import app
from tests.browser.conftest import serving
from tests.browser.sample import DIGEST, TOKEN, sample_app
from wire.errors import InvalidInputError, NotAuthenticatedError

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


def test_without_a_login_the_remedy_is_to_log_in(tmp_path: Path) -> None:
    empty = {"XDG_CONFIG_HOME": str(tmp_path), "FORESHORE_URL": "", "FORESHORE_TOKEN_FILE": ""}
    result = CliRunner().invoke(app, ["devices"], env=empty)
    assert isinstance(result.exception, NotAuthenticatedError)
    assert "foreshore login" in str(result.exception)
