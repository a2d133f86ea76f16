"""Publishing against a real socket: what is sent, what is checked before signing, what each failure says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper
from typer.testing import CliRunner

from model_registry import keys_cli
from model_registry.client import ControlClient, Publication
from model_registry.exit_codes import exit_code
from model_registry.login import Login, save_login
from model_registry.manifest import sha256
from model_registry.publish import Publisher, PublishRequest
from model_registry.publish_cli import register
from model_registry.transport import Transport, error_of
from model_registry.trust.desk import SigningDesk
from model_registry.trust.keys import create_key
from tests.fakes.registry_server import TOKEN, ControlState, build_release, manifest_for, running_control
from tests.fakes.trust import PUBLISHER, MemoryTrust
from wire.errors import (
    ConflictError,
    ForeshoreError,
    GateFailedError,
    IntegrityError,
    InvalidInputError,
    NotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
    OverloadedError,
    SignatureError,
    TooLargeError,
    UnavailableError,
    UnsupportedModelError,
)


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.units = 0
        self.states: list[str] = []

    def begin(self, step: str, total: int) -> None:
        self.steps.append(step)

    def advance(self, amount: int) -> None:
        self.units += amount

    def say(self, text: str) -> None:
        pass

    def show(self, publication: Publication) -> None:
        self.states.append(publication.state)


@pytest.fixture
def state() -> ControlState:
    return ControlState()


@pytest.fixture
def url(state: ControlState) -> Iterator[str]:
    with running_control(state) as address:
        yield address


def client_for(url: str, token: str = TOKEN) -> ControlClient:
    return ControlClient(Transport(url, token, sleep=lambda _: None))


@pytest.fixture
def client(url: str) -> Iterator[ControlClient]:
    with client_for(url) as client:
        yield client


@pytest.fixture
def desk(state: ControlState, tmp_path: Path) -> SigningDesk:
    return MemoryTrust(tmp_path / "desk", counter=state.counter).desk


@pytest.fixture
def model(tmp_path: Path) -> Path:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "model.onnx"
    )
    return tmp_path / "model.onnx"


def request(model: Path, **changes: Any) -> PublishRequest:
    fields: dict[str, Any] = {"path": model, "name": "vision", "targets": ("cpu-x86", "jetson-orin"), **changes}
    return PublishRequest(**fields)


def publish(client: ControlClient, desk: SigningDesk, wanted: PublishRequest) -> Any:
    return Publisher(client, desk, Watcher()).publish(wanted)


def test_a_model_is_published_and_signed_by_the_publisher(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    watcher = Watcher()
    wanted = request(model, licence="MIT", tenant="demo", version="2.0.0")
    result = Publisher(client, desk, watcher).publish(wanted)
    assert state.signed is not None
    assert state.counter.repository.find_release("vision", result.release.digest) is not None
    signers = state.counter.repository.find_signers("vision", result.release.digest)
    assert signers is not None
    assert signers[0] == PUBLISHER
    assert len(signers[1]) == 1
    assert state.counter.repository.find_signers("vision", "ab" * 32) is None
    assert state.signed == state.counter.repository.current[PUBLISHER]
    assert result.release.version == "2.0.0"
    assert result.uploaded_bytes == result.source_bytes == model.stat().st_size
    assert set(result.manifests) == {"cpu-x86", "jetson-orin"}
    assert watcher.steps == ["hash", "upload", "compile", "check", "sign"]
    assert watcher.units == 2 * model.stat().st_size
    assert watcher.states[-1] == "awaiting_signature"
    assert state.blobs[sha256(model.read_bytes())] == model.read_bytes()


def test_a_second_publication_uploads_nothing_again(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    publish(client, desk, request(model))
    state.requests.clear()
    assert publish(client, desk, request(model)).uploaded_bytes == 0
    assert not [line for line in state.requests if line.startswith("PUT")]


def test_golden_vision_and_recipe_travel_with_the_publication(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "golden.npz", x=np.zeros(3))
    publish(client, desk, request(model, golden=tmp_path / "golden.npz", recipe={"precision": "int8"}, vision={"a": 1}))
    body = state.publication["body"]
    assert body["golden"] == sha256((tmp_path / "golden.npz").read_bytes())
    assert body["golden"] in state.blobs
    assert body["recipe"] == {"precision": "int8"}
    assert body["vision"] == {"a": 1}
    assert "version" not in body


@pytest.mark.parametrize("name", ["absent.npz", "not.npz", "golden.pkl"])
def test_a_wrong_golden_file_is_refused_before_anything_is_stored(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path, tmp_path: Path, name: str
) -> None:
    if name != "absent.npz":
        (tmp_path / name).write_bytes(b"text")
    with pytest.raises(InvalidInputError, match=name):
        publish(client, desk, request(model, golden=tmp_path / name))
    assert state.requests == []


def test_a_source_that_cannot_be_published_stores_nothing(
    client: ControlClient, state: ControlState, desk: SigningDesk, tmp_path: Path
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UnsupportedModelError):
        publish(client, desk, request(tmp_path / "weights.pth"))
    assert state.requests == []


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"tenant": "other"},
        {"version": "9.9.9"},
        {"source_digest": "0" * 64},
        {"source_format": "gguf"},
        {"licence": "stolen"},
        {"kind": "language"},
    ],
)
def test_a_release_that_was_not_asked_for_is_never_signed(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path, changes: dict[str, Any]
) -> None:
    state.build = lambda body, state: build_release(body, state, **changes)
    with pytest.raises(IntegrityError, match="the release to sign"):
        publish(client, desk, request(model, tenant="demo", version="1.0.0"))
    assert state.signed is None


def test_a_release_with_one_target_less_is_never_signed(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    state.build = lambda body, state: build_release({**body, "targets": body["targets"][:1]}, state)
    with pytest.raises(IntegrityError, match="targets"):
        publish(client, desk, request(model))
    assert state.signed is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"source_digest": "0" * 64}, IntegrityError),
        ({"target": "rtx"}, IntegrityError),
        ({"name": "other"}, IntegrityError),
        (
            {"gates": [{"name": "top1", "value": 0.5, "limit": 0.9, "sense": ">=", "passed": True}]},
            GateFailedError,
        ),
    ],
)
def test_a_release_over_a_wrong_artefact_is_never_signed(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path, changes: Any, error: Any
) -> None:
    def build(body: dict[str, Any], state: ControlState) -> dict[str, Any]:
        honest = build_release(body, state)
        artefacts = []
        for target in body["targets"]:
            manifest = manifest_for(body, target, client_source(body), **changes)
            state.blobs[manifest.digest] = manifest.to_bytes()
            artefacts.append(
                {
                    "target": target,
                    "manifest": manifest.digest,
                    "manifest_bytes": len(manifest.to_bytes()),
                    "size_bytes": 1,
                    "runtime": "onnxruntime",
                    "precision": "int8",
                }
            )
        assert honest
        return build_release(body, state, artefacts=artefacts)

    state.build = build
    with pytest.raises(error):
        publish(client, desk, request(model))
    assert state.signed is None


def client_source(body: dict[str, Any]) -> str:
    from model_registry.sources import SourceFile, source_digest

    return source_digest(body["source"]["format"], [SourceFile(**file) for file in body["source"]["files"]])


def test_a_manifest_with_other_bytes_is_never_accepted(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    def build(body: dict[str, Any], state: ControlState) -> dict[str, Any]:
        document = build_release(body, state)
        for digest in [d for d, data in state.blobs.items() if data.startswith(b'{"')]:
            state.blobs[digest] += b" "
        return document

    state.build = build
    with pytest.raises(IntegrityError):
        publish(client, desk, request(model))
    assert state.signed is None


def test_a_failed_gate_is_told_with_its_numbers(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    gate = {"name": "top1_agreement", "value": 0.5, "limit": 0.9, "sense": ">=", "passed": False}
    state.jobs = [{"job_id": "j", "target": "cpu-x86", "state": "failed", "gates": [gate]}]
    state.build = lambda body, state: {"state": "failed"}
    with pytest.raises(GateFailedError, match=r"cpu-x86: top1_agreement is 0.5, the limit is >= 0.9"):
        publish(client, desk, request(model))


def test_a_failed_job_is_told_with_its_reason_and_log(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    job = {"job_id": "j", "target": "cpu-x86", "state": "failed", "code": "unsupported_model", "reason": "bad op Foo"}
    state.jobs = [{**job, "log": "line one"}]
    state.build = lambda body, state: {"state": "failed"}
    with pytest.raises(UnsupportedModelError, match="bad op Foo") as caught:
        publish(client, desk, request(model))
    assert caught.value.details["log"] == "line one"
    state.jobs = []
    with pytest.raises(ForeshoreError, match="no reason was given"):
        publish(client, desk, request(model))


def test_a_cancelled_publication_is_a_conflict(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    state.build = lambda body, state: {"state": "cancelled"}
    with pytest.raises(ConflictError, match="cancelled"):
        publish(client, desk, request(model))


def test_interrupting_cancels_the_publication(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    class Impatient(Watcher):
        def show(self, publication: Publication) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Publisher(client, desk, Impatient()).publish(request(model))
    assert state.cancelled


def test_publishing_survives_cut_connections_and_overload(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    state.faults = [
        ("HEAD blobs/", 0),
        ("PUT blobs/", 0),
        ("PUT blobs/", 503),
        ("GET publications/p1/events", 0),
        ("GET publications/p1", 429),
        ("GET blobs/", 0),
    ]
    publish(client, desk, request(model))
    assert state.signed is not None
    assert state.faults == []


def test_without_an_event_stream_it_polls(
    client: ControlClient, state: ControlState, desk: SigningDesk, model: Path
) -> None:
    state.streams, state.stages = False, 6
    publish(client, desk, request(model))
    assert state.requests.count("GET publications/p1/events") >= 3


def test_what_cannot_be_repeated_is_sent_once(client: ControlClient, state: ControlState) -> None:
    state.faults = [("POST publications", 503)]
    with pytest.raises(UnavailableError):
        client.create_publication({})
    assert state.requests == ["POST publications"]


def test_retries_end(client: ControlClient, state: ControlState) -> None:
    state.faults = [("HEAD", 503)] * 50
    with pytest.raises(UnavailableError):
        client.has_blob("0" * 64)
    assert len(state.requests) == 5


def test_a_download_that_breaks_goes_on_where_it_was(
    client: ControlClient, state: ControlState, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 4096
    digest = client.put_blob(data)
    heard: list[int] = []
    assert client.download_blob(digest, tmp_path / "got", max_bytes=1 << 21, on_bytes=heard.append) == len(data)
    assert sum(heard) == len(data)
    assert (tmp_path / "got").read_bytes() == data
    state.blobs[digest] = data[:-1] + b"!"
    with pytest.raises(IntegrityError):
        client.download_blob(digest, tmp_path / "other", max_bytes=1 << 21)
    with pytest.raises(IntegrityError):
        client.download_blob(digest, tmp_path / "other", max_bytes=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got"]


def test_who_hears_of_a_download_can_end_it(client: ControlClient, tmp_path: Path) -> None:
    digest = client.put_blob(b"x" * 1000)

    def end(num_bytes: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        client.download_blob(digest, tmp_path / "got", max_bytes=1000, on_bytes=end)
    assert list(tmp_path.iterdir()) == []


def test_a_blob_with_other_bytes_or_too_many_is_refused(client: ControlClient, state: ControlState) -> None:
    digest = client.put_blob(b"honest")
    assert client.get_blob(digest) == b"honest"
    state.blobs[digest] = b"forged"
    with pytest.raises(IntegrityError):
        client.get_blob(digest)
    with pytest.raises(TooLargeError):
        client.get_blob(digest, max_bytes=3)


def test_nobody_there_is_told_with_the_address() -> None:
    with client_for("http://127.0.0.1:9") as client, pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        client.get("models")


def test_a_wrong_token_is_refused(url: str) -> None:
    with client_for(url, "wrong") as client, pytest.raises(NotAuthenticatedError):
        client.get_publication("p1")


def test_an_address_that_is_not_http_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="ftp"):
        Transport("ftp://host")


def test_an_answer_that_is_not_json_is_told() -> None:
    transport = Transport("http://x", transport=httpx.MockTransport(lambda _: httpx.Response(200, text="<html>")))
    with pytest.raises(UnavailableError, match="JSON"):
        transport.call("GET", "models")
    transport.close()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, b"", NotAuthenticatedError),
        (403, b"{}", NotAllowedError),
        (404, b"[]", NotFoundError),
        (409, b'{"code": "conflict"}', ConflictError),
        (422, b'{"code": "bad_signature", "detail": "d"}', SignatureError),
        (429, b"not json", OverloadedError),
        (501, b'{"code": "missing_extra"}', ForeshoreError),
        (500, b'{"code": "nobody_knows"}', ForeshoreError),
        (418, b"", ForeshoreError),
    ],
)
def test_an_error_comes_back_as_its_type(status: int, body: bytes, kind: type[ForeshoreError]) -> None:
    assert type(error_of(status, body, "http://x")) is kind


def test_exit_codes_say_what_kind_of_failure_it_was() -> None:
    kinds = (ForeshoreError, InvalidInputError, UnavailableError, NotAllowedError, GateFailedError, SignatureError)
    assert [exit_code(kind("x")) for kind in kinds] == [1, 2, 3, 4, 5, 5]
    assert exit_code(ValueError()) == 1


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
