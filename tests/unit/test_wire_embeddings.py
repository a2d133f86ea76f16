"""Embeddings on the wire: the bytes of the engine's messages never change; bodies are checked alike everywhere."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wire.embeddings import EmbeddingRequest, embedding_list, embedding_object
from wire.errors import InvalidInputError

pb = pytest.importorskip("wire.engine_pb2")

FOLDER = Path(__file__).parent.parent / "golden" / "wire" / "engine-v1"
MESSAGES: dict[str, Any] = {
    "embed-request": pb.EmbedRequest(
        protocol_version=1, request_id="r-1", token_ids=[1, 300, 70000], salt=bytes(range(8)), priority=-2
    ),
    "embed-reply": pb.EmbedReply(vector=[0.5, -0.25, 0.125], cached_tokens=16),
    "status-reply": pb.StatusReply(worker="w", role="both", state="serving", embedding_size=576),
}


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_the_bytes_of_version_1_are_what_they_were(name: str) -> None:
    data = (FOLDER / f"{name}.bin").read_bytes()
    assert MESSAGES[name].SerializeToString(deterministic=True) == data
    assert type(MESSAGES[name]).FromString(data) == MESSAGES[name]


def test_every_committed_file_is_still_spoken() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(MESSAGES)


def test_a_field_of_a_newer_peer_is_passed_over() -> None:
    newer = (FOLDER / "embed-request.bin").read_bytes() + bytes([15 << 3, 7])  # field 15, a varint
    assert list(pb.EmbedRequest.FromString(newer).token_ids) == [1, 300, 70000]


@pytest.mark.parametrize(
    ("given", "inputs"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([0], [[0]])],
)
def test_every_shape_becomes_one_list(given: Any, inputs: Any) -> None:
    assert EmbeddingRequest(model="m", input=given).inputs(4) == inputs


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "input is empty"),
        ([], "empty list"),
        (None, "NoneType"),
        (7, "input is int"),
        ([True], "input 0 is bool"),
        ([1, True], "holds 'True'"),
        ([1, 1 << 32], "holds '4294967296'"),
        ([[1], "a"], "mixes"),
        ([[1], ["a"]], "input 1 holds 'a'"),
        (["a"] * 5, "5 inputs"),
    ],
)
def test_anything_else_is_refused_by_name(given: Any, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason) as caught:
        EmbeddingRequest(model="m", input=given).inputs(4)
    assert caught.value.details["param"] == "input"
    assert caught.value.remedy


def test_shorter_vectors_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="dimensions is 64"):
        EmbeddingRequest(model="m", input="a", dimensions=64).inputs(4)


def test_the_answer_is_openais() -> None:
    vector = np.array([0.5, -0.25], dtype=np.float32)
    data = [embedding_object(0, vector, "float"), embedding_object(1, vector, "base64")]
    assert data[0] == {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}
    assert base64.b64decode(data[1]["embedding"]) == vector.tobytes()
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    assert embedding_list("m", data, 3) == {"object": "list", "model": "m", "data": data, "usage": usage}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, message in MESSAGES.items():
        if not (FOLDER / f"{name}.bin").exists():
            (FOLDER / f"{name}.bin").write_bytes(message.SerializeToString(deterministic=True))
