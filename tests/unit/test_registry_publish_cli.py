"""`foreshore publish` and `keys` as commands: output, exit codes, sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from model_registry import keys_cli
from model_registry.exit_codes import exit_code
from model_registry.login import Login, save_login
from model_registry.publish_cli import register
from model_registry.trust.keys import create_key
from tests.fakes.registry_server import (
    TOKEN,
    ControlState,
    running_control,
    write_model,
)
from wire.errors import (
    ForeshoreError,
    GateFailedError,
    InvalidInputError,
    NotAllowedError,
    SignatureError,
    UnavailableError,
)


@pytest.fixture
def state() -> ControlState:
    return ControlState()


@pytest.fixture
def url(state: ControlState) -> Iterator[str]:
    with running_control(state) as address:
        yield address


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("FORESHORE_URL", "FORESHORE_TOKEN_FILE", "FORESHORE_KEY_PASSPHRASE", "FORESHORE_TENANT"):
        monkeypatch.delenv(name, raising=False)
    app = typer.Typer()
    register(app)
    app.add_typer(keys_cli.app, name="keys")
    return app


def test_the_command_publishes_and_prints_one_json_object_last(
    app: typer.Typer, url: str, state: ControlState, model: Path, tmp_path: Path
) -> None:
    save_login(Login(url, TOKEN, tenant="demo"), {"XDG_CONFIG_HOME": str(tmp_path / "config")}, tmp_path)
    assert (tmp_path / "config/foreshore/login.json").stat().st_mode & 0o777 == 0o600
    runner = CliRunner()
    begun = runner.invoke(app, ["keys", "init", "--publisher", "alice"])
    assert begun.exit_code == 0, begun.output
    arguments = ["publish", str(model), "--name", "vision", "--targets", "cpu-x86,cpu-x86, jetson-orin"]
    done = runner.invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    assert [artefact["target"] for artefact in summary["artefacts"]] == ["cpu-x86", "jetson-orin"]
    assert summary["artefacts"][0]["gates"][0]["passed"] is True
    plain = runner.invoke(app, arguments)
    assert "released vision 1.0.0" in plain.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--url", "http://127.0.0.1:9"], 4, "no token"),
        ([], 4, "no control plane"),
        (["--url", "http://127.0.0.1:9", "--token-file", "TOKEN"], 2, "absent.onnx does not exist"),
        (["--url", "http://127.0.0.1:9", "--token-file", "TOKEN", "--kind", "music"], 2, "music"),
        (["--url", "http://127.0.0.1:9", "--token-file", "TOKEN", "--recipe", "none.yaml"], 2, "none.yaml"),
    ],
)
def test_the_command_fails_with_the_right_code_and_sentence(
    app: typer.Typer, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    (tmp_path / "token").write_text("secret\n")
    create_key(tmp_path / "config/foreshore/keys/publisher.pem")
    arguments = [str(tmp_path / "token") if part == "TOKEN" else part for part in arguments]
    command = ["publish", "absent.onnx", "--name", "v", "--targets", "cpu-x86", "--json", *arguments]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == code
    assert says in done.output
    assert "error" in json.loads(done.stdout.splitlines()[-1])


def test_the_command_without_a_key_says_how_to_make_one(app: typer.Typer, tmp_path: Path, model: Path) -> None:
    (tmp_path / "token").write_text("secret")
    command = ["publish", str(model), "--name", "v", "--targets", "t", "--url", "http://127.0.0.1:9"]
    done = CliRunner().invoke(app, [*command, "--token-file", str(tmp_path / "token")])
    assert done.exit_code == 2
    assert "foreshore keys create" in done.output


def test_a_key_is_made_shown_and_never_overwritten(app: typer.Typer, tmp_path: Path) -> None:
    runner = CliRunner()
    made = json.loads(runner.invoke(app, ["keys", "create", str(tmp_path / "k.pem"), "--json"]).stdout)
    shown = json.loads(runner.invoke(app, ["keys", "show", str(tmp_path / "k.pem"), "--json"]).stdout)
    assert made == shown
    assert runner.invoke(app, ["keys", "create", str(tmp_path / "k.pem")]).exit_code == 1


def test_exit_codes_say_what_kind_of_failure_it_was() -> None:
    kinds = (ForeshoreError, InvalidInputError, UnavailableError, NotAllowedError, GateFailedError, SignatureError)
    assert [exit_code(kind("x")) for kind in kinds] == [1, 2, 3, 4, 5, 5]
    assert exit_code(ValueError()) == 1
