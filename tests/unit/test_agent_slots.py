"""What lies on the disk is whole or counts for nothing, whatever is deleted, damaged or in the way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from edge_agent.config import Profile
from edge_agent.hardware import UnsuitableError, check_suits, find_hardware
from edge_agent.slots import RESERVE_BYTES, Store
from model_registry.manifest import ArtefactFile, Chunk, Manifest, Requirements
from wire.errors import InsufficientSpaceError, IntegrityError

PART_BYTES = 10_000


def _manifest(seed: int, **requires: object) -> tuple[Manifest, list[bytes]]:
    parts = [hashlib.shake_256(f"{seed}.{n}".encode()).digest(PART_BYTES) for n in range(3)]
    data = b"".join(parts)
    chunks = [Chunk(digest=hashlib.sha256(part).hexdigest(), size_bytes=PART_BYTES) for part in parts]
    file = ArtefactFile(
        path="m/model.onnx", size_bytes=len(data), digest=hashlib.sha256(data).hexdigest(), chunks=chunks
    )
    manifest = Manifest(
        name="m",
        kind="tensor",
        target="cpu-x86",
        runtime="onnxruntime",
        precision="fp32",
        files=[file],
        entry="m/model.onnx",
        requires=Requirements.model_validate(requires),
        source_digest="0" * 64,
    )
    return manifest, parts


def _stored(store: Store, seed: int) -> Manifest:
    manifest, parts = _manifest(seed)
    store.put_manifest(manifest.digest, manifest.to_bytes())
    store.open_partial(manifest).put_all(list(enumerate(parts)))
    store.complete(manifest)
    return manifest


def test_disk_is_taken_before_the_first_chunk(tmp_path: Path) -> None:
    store = Store(tmp_path, 1 << 40)
    manifest, _ = _manifest(1)
    store.open_partial(manifest)
    held = (tmp_path / "partial" / manifest.digest / "files" / "m" / "model.onnx").stat()
    assert held.st_blocks * 512 >= manifest.size_bytes


def test_a_damaged_chunk_is_fetched_again_and_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path, 1 << 40)
    manifest, parts = _manifest(1)
    store.open_partial(manifest).put_all([(0, parts[0]), (2, parts[2])])
    path = tmp_path / "partial" / manifest.digest / "files" / "m" / "model.onnx"
    with path.open("r+b") as file:
        file.write(b"\0" * 100)
    assert store.open_partial(manifest).missing() == [0, 1]


def test_a_damaged_artefact_goes_as_a_whole(tmp_path: Path) -> None:
    store = Store(tmp_path, 1 << 40)
    manifest = _stored(store, 1)
    (store.files(manifest.digest) / "m" / "model.onnx").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="not what was signed"):
        store.complete(manifest)
    assert not store.has(manifest.digest)
    assert store.held() == []


def test_collecting_keeps_what_is_held_and_finishes_what_a_cut_left(tmp_path: Path) -> None:
    store = Store(tmp_path, 1 << 40)
    kept, gone = _stored(store, 1), _stored(store, 2)
    left = tmp_path / "trash" / "artefacts-left-by-a-cut"
    left.mkdir()
    (left / "file").write_bytes(b"x")
    assert store.collect({kept.digest}) == 2  # an artefact and its manifest
    assert store.held() == [kept.digest]
    assert store.find_manifest(gone.digest) is None
    assert list((tmp_path / "trash").iterdir()) == []


def test_a_lost_manifest_is_read_from_the_artefact(tmp_path: Path) -> None:
    store = Store(tmp_path, 1 << 40)
    manifest = _stored(store, 1)
    store.manifest_file(manifest.digest).unlink()
    assert store.find_manifest(manifest.digest) == manifest


def test_preflight_names_both_numbers_and_keeps_a_reserve(tmp_path: Path) -> None:
    manifest, parts = _manifest(1)
    needed = RESERVE_BYTES + 8 * 4096
    with pytest.raises(InsufficientSpaceError) as refused:
        Store(tmp_path / "a", needed - 1).preflight(manifest)
    assert refused.value.details == {"needed_bytes": needed, "free_bytes": needed - 1}
    store = Store(tmp_path / "b", needed + 4096)  # a block for the record of what is done
    store.preflight(manifest)
    store.open_partial(manifest).put(0, parts[0])  # what is there already is not counted twice
    store.preflight(manifest)


@pytest.mark.parametrize(
    ("requires", "sentence"),
    [
        ({"hardware_key": "sm87-trt10"}, "built for hardware key sm87-trt10, here is none"),
        ({"architectures": ["sparc"]}, "is for architecture sparc, here is"),
        ({"cpu_features": ["avx9000"]}, "all but avx9000"),
        ({"runtime_version": "99.1"}, "onnxruntime version 99.1, here is"),
    ],
)
def test_other_hardware_is_refused_with_what_is_needed_and_what_is_here(
    tmp_path: Path, requires: dict[str, object], sentence: str
) -> None:
    manifest, _ = _manifest(1, **requires)
    profile = Profile(name="test", targets=["cpu-x86"], memory_budget_bytes=1 << 30)
    hardware = find_hardware(profile, tmp_path)
    if not hardware.cpu_features and "cpu_features" in requires:
        pytest.skip("this machine does not tell its processor's features")
    with pytest.raises(UnsuitableError, match=sentence):
        check_suits(manifest, hardware)
    check_suits(_manifest(1)[0], hardware)
