"""The bytes on the wire of version 1 never change: one committed file per message, frame, record and document.

A file that is missing is a failure, not a reason to write one: `python -m tests.unit.test_wire_golden` makes new ones
for a new kind of message, and its diff is reviewed. What the files hold must also be read back to the same value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from model_registry.manifest import (
    ArtefactFile,
    Chunk,
    DeltaEncoding,
    GateResult,
    Golden,
    Manifest,
    Release,
    ReleaseArtefact,
    Requirements,
    Vision,
    parse_manifest,
    parse_release,
)
from wire import decision, messages
from wire.decision import Candidate, Input, decide
from wire.envelope import key_id, open_envelope, parse_envelope, sign
from wire.errors import UnknownVersionError
from wire.frames import ChunkFrame, Codec, parse_frame
from wire.messages import (
    DESIRED_TYPE,
    Desired,
    DesiredModel,
    Epoch,
    Event,
    Hardware,
    Message,
    ModelState,
    Need,
    Phase,
    Reported,
    Result,
    Status,
)

FOLDER = Path(__file__).parent.parent / "golden" / "wire" / "v1"
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
A, B, C, D = (letter * 64 for letter in "abcd")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))  # a test vector, not a secret

MESSAGES: dict[str, Message] = {
    "desired": Desired(
        tenant="demo",
        device_id="orin-1",
        generation=7,
        issued_at=AT,
        expires_at=AT,
        models=[
            DesiredModel(
                name="vision",
                version="1.2.0",
                release=A,
                manifest=B,
                manifest_bytes=4096,
                target="jetson-orin",
                attempt=1,
                soak_s=2.5,
                rollout_id="r-1",
            )
        ],
    ),
    "reported": Reported(
        generation=7,
        agent_version="0.1.0",
        boot_epoch=3,
        reported_at=AT,
        hardware=Hardware(
            profile="jetson-orin-8gb",
            targets=["jetson-orin", "cpu-reference"],
            architecture="aarch64",
            cpu_features=["asimd"],
            memory_bytes=8 << 30,
            memory_budget_bytes=4 << 30,
            disk_free_bytes=1 << 34,
            runtimes={"onnxruntime": "1.22.0"},
            max_context_tokens=2048,
        ),
        models=[
            ModelState(
                name="vision",
                active_version="1.1.0",
                active_manifest=C,
                phase=Phase.FETCH,
                wanted_manifest=B,
                result=Result.ROLLED_BACK,
                reason="gate_failed: the outputs differ from the golden ones",
                bytes_done=10,
                bytes_total=20,
                wire_bytes=5,
                encoding="whole",
            )
        ],
        local_api="http://127.0.0.1:8700",
    ),
    "status": Status(online=True, boot_epoch=3),
    "need": Need(manifest=B, encoding="delta-1", missing=[(0, 3), (9, 1)], received=12, held=[C]),
    "event": Event(event_id="e-1", kind="inference", at=AT, body={"model": "vision", "latency_ms": 3.5}),
    "epoch": Epoch(epoch=1, started_at=AT),
}

FRAMES: dict[str, ChunkFrame] = {
    "frame-raw": ChunkFrame(bytes(8), 0, 5, Codec.RAW, b"hello", bytes(range(16))),
    "frame-xor": ChunkFrame(b"\1" * 8, 77, 4, Codec.XOR_SPLIT2_ZSTD, b"\0\0\0\2ab\0\0\0\2cd", b"\2" * 16, b"\3" * 32),
    "frame-reuse": ChunkFrame(b"\1" * 8, 78, 4, Codec.REUSE, b"", b"\2" * 16, b"\3" * 32),
}

DECISION = decide(
    decision_id="d-1",
    kind="offload",
    policy="offload/1",
    config={"weight": 1},
    decided_at=AT.isoformat(),
    inputs={"queue": Input(3, 0.5)},
    candidates=[
        Candidate("device", {"latency_s": 1.5, "cost": 0.0}),
        Candidate("cloud", {"latency_s": 0.5, "cost": 0.25}),
        Candidate("peer", excluded=("offline",)),
    ],
    weights={"latency_s": 1.0, "cost": 2.0},
    predicted={"latency_s": 0.5},
    subject="request-1",
)

MANIFEST = Manifest(
    name="vision",
    kind="tensor",
    target="jetson-orin",
    runtime="onnxruntime",
    precision="int8",
    files=[
        ArtefactFile(
            path="model.onnx",
            size_bytes=5,
            digest=A,
            chunks=[Chunk(digest=B, size_bytes=4, element_bytes=2), Chunk(digest=C, size_bytes=1)],
        ),
        ArtefactFile(path="golden.npz", size_bytes=0, digest=D, chunks=[]),
    ],
    entry="model.onnx",
    requires=Requirements(memory_bytes=100, disk_bytes=200, architectures=["aarch64"]),
    golden=Golden(path="golden.npz", num_cases=4, min_cosine=0.99),
    vision=Vision(resize_pixels=256, crop_pixels=224, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), labels=["Käse"]),
    gates=[GateResult(name="top1_agreement", value=0.98, limit=0.95, sense=">=", passed=True)],
    recipe_digest=D,
    source_digest=C,
    tools={"onnxruntime": "1.22.0"},
)

RELEASE = Release(
    tenant="demo",
    name="vision",
    version="1.2.0",
    sequence=3,
    kind="tensor",
    licence="BSD-3-Clause",
    source_format="onnx",
    source_digest=C,
    created_at="2026-01-02T03:04:05Z",
    artefacts=[
        ReleaseArtefact(
            target="jetson-orin",
            manifest=B,
            manifest_bytes=900,
            size_bytes=5,
            runtime="onnxruntime",
            precision="int8",
            deltas=[DeltaEncoding(name="delta-1", base_manifest=A, index=D, wire_bytes=99)],
        )
    ],
)


def documents() -> dict[str, bytes]:
    """Every kind of thing that crosses a process boundary, as bytes by file name."""
    found = {f"{name}.json": message.to_bytes() for name, message in MESSAGES.items()}
    found |= {f"{name}.bin": frame.to_bytes() for name, frame in FRAMES.items()}
    found["decision.json"] = json.dumps(DECISION.to_dict(), sort_keys=True).encode()
    found["manifest.json"] = MANIFEST.to_bytes()
    found["release.json"] = RELEASE.to_bytes()
    found["envelope.json"] = sign(DESIRED_TYPE, MESSAGES["desired"].to_bytes(), KEY).to_bytes()
    return found


@pytest.mark.parametrize("name", sorted(documents()))
def test_the_bytes_of_version_1_are_what_they_were(name: str) -> None:
    assert documents()[name] == (FOLDER / name).read_bytes()


def test_every_committed_file_is_still_spoken() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(documents())


def test_every_kind_of_message_has_a_file() -> None:
    nested = {DesiredModel, ModelState, Hardware, Message}
    kinds = {kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Message)}
    assert {type(message) for message in MESSAGES.values()} == kinds - nested


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_messages_are_read_back(name: str) -> None:
    message = MESSAGES[name]
    assert messages.parse(type(message), (FOLDER / f"{name}.json").read_bytes()) == message


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_frames_are_read_back(name: str) -> None:
    assert parse_frame((FOLDER / f"{name}.bin").read_bytes()) == FRAMES[name]


def test_documents_are_read_back() -> None:
    assert parse_manifest((FOLDER / "manifest.json").read_bytes()) == MANIFEST
    assert parse_release((FOLDER / "release.json").read_bytes()) == RELEASE
    assert decision.from_dict(json.loads((FOLDER / "decision.json").read_bytes())).to_dict() == DECISION.to_dict()
    payload = open_envelope(
        (FOLDER / "envelope.json").read_bytes(), DESIRED_TYPE, {key_id(KEY.public_key()): KEY.public_key()}
    )
    assert payload == MESSAGES["desired"].to_bytes()


def test_the_recorded_decision_is_made_again() -> None:
    assert DECISION.chosen == "cloud"
    assert decision.replay(decision.from_dict(json.loads((FOLDER / "decision.json").read_bytes()))) == "cloud"


def changed(name: str, **fields: Any) -> bytes:
    """The committed document with other values in it."""
    return json.dumps({**json.loads((FOLDER / name).read_bytes()), **fields}).encode()


def _read_next_version(name: str, kind: type[Message]) -> Message:
    return messages.parse(kind, changed(f"{name}.json", v=2))


def readers() -> dict[str, Callable[[], object]]:
    """One attempt per kind to read a document of a version that nobody has written yet."""
    attempts: dict[str, Callable[[], object]] = {
        name: partial(_read_next_version, name, type(message)) for name, message in MESSAGES.items()
    }
    attempts["frame"] = lambda: parse_frame(b"FSC2" + (FOLDER / "frame-raw.bin").read_bytes()[4:])
    attempts["decision"] = lambda: decision.from_dict(json.loads(changed("decision.json", version=2)))
    attempts["manifest"] = lambda: parse_manifest(changed("manifest.json", schema="foreshore.manifest/2"))
    attempts["release"] = lambda: parse_release(changed("release.json", schema="foreshore.release/2"))
    return attempts


@pytest.mark.parametrize("name", sorted(readers()))
def test_an_unknown_version_is_refused_before_anything_else(name: str) -> None:
    with pytest.raises(UnknownVersionError):
        readers()[name]()


def test_an_unknown_codec_is_refused() -> None:
    data = bytearray((FOLDER / "frame-raw.bin").read_bytes())
    data[20] = 200
    with pytest.raises(UnknownVersionError, match="codec 200"):
        parse_frame(bytes(data))


def test_an_envelope_keeps_its_signatures() -> None:
    assert len(parse_envelope((FOLDER / "envelope.json").read_bytes()).signatures) == 1


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file_name, data in documents().items():
        if not (FOLDER / file_name).exists():
            (FOLDER / file_name).write_bytes(data)
