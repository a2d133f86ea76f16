"""Publishing against a real socket: what is sent, and what is checked before signing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_registry.client import ControlClient, Publication
from model_registry.manifest import sha256
from model_registry.publish import Publisher, PublishRequest
from model_registry.trust.desk import SigningDesk
from tests.fakes.registry_server import (
    ControlState,
    build_release,
    client_for,
    manifest_for,
    running_control,
    write_model,
)
from tests.fakes.trust import PUBLISHER, MemoryTrust
from wire.errors import (
    ConflictError,
    ForeshoreError,
    GateFailedError,
    IntegrityError,
    InvalidInputError,
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


@pytest.fixture
def client(url: str) -> Iterator[ControlClient]:
    with client_for(url) as client:
        yield client


@pytest.fixture
def desk(state: ControlState, tmp_path: Path) -> SigningDesk:
    return MemoryTrust(tmp_path / "desk", counter=state.counter).desk


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path)


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
