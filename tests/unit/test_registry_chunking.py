"""Chunks follow tensors: in safetensors, GGUF and ONNX, inside the file and beside it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from model_registry.chunking import (
    MIN_CHUNK_BYTES,
    cover,
    cut,
    describe_file,
    describe_folder,
    find_spans,
    iter_chunks,
)
from model_registry.layout import Span
from model_registry.manifest import ArtefactFile, sha256
from wire.errors import IntegrityError, InvalidInputError

KIB = 1024


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "big": rng.normal(size=(300, 256)).astype(np.float32),
        "half": rng.normal(size=(512, 128)).astype(np.float16),
        "small": rng.normal(size=(10,)).astype(np.float32),
        "bytes": rng.integers(0, 255, 100_000).astype(np.uint8),
    }


def save_onnx(path: Path, weights: dict[str, np.ndarray], *, external: bool = False, note: str = "") -> None:
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}.out"]) for name in weights]
    outputs = [helper.make_tensor_value_info(f"{t.name}.out", t.data_type, list(t.dims)) for t in initializers]
    inputs = [helper.make_tensor_value_info("unused", TensorProto.FLOAT, [1])]
    graph = helper.make_graph(nodes, f"graph{note}", inputs, outputs, initializers)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    onnx.save_model(
        model,
        path,
        save_as_external_data=external,
        location=f"{path.name}.data" if external else None,
        size_threshold=0,
    )


def save_gguf(path: Path, weights: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "cd"])
    writer.add_array("numbers", [1, 2, 3])
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save(path: Path, weights: dict[str, np.ndarray]) -> None:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    elif path.suffix == ".onnx":
        save_onnx(path, weights)
    else:
        save_gguf(path, {name: value for name, value in weights.items() if value.dtype != np.uint8})


def changed(old: ArtefactFile, new: ArtefactFile) -> int:
    known = {chunk.digest for chunk in old.chunks}
    return sum(chunk.size_bytes for chunk in new.chunks if chunk.digest not in known)


@pytest.mark.parametrize("suffix", ["safetensors", "onnx", "gguf"])
def test_the_tensors_of_each_format_are_found_with_their_widths(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    weights = tensors()
    save(path, weights)
    data = path.read_bytes()
    spans = {span.name: span for span in find_spans(path)}
    for name, span in spans.items():
        value = weights[name]
        assert data[span.offset : span.offset + span.size_bytes] == value.tobytes()
        assert span.element_bytes == (1 if value.dtype == np.uint8 else value.itemsize)
    assert len(spans) == (3 if suffix == "gguf" else 4)


@pytest.mark.parametrize("suffix", ["safetensors", "onnx", "gguf"])
def test_one_changed_tensor_changes_only_its_own_chunks(tmp_path: Path, suffix: str) -> None:
    weights = tensors()
    save(tmp_path / f"old.{suffix}", weights)
    weights["half"] = weights["half"] + np.float16(1)
    save(tmp_path / f"new.{suffix}", weights)
    old = describe_file(tmp_path / f"old.{suffix}", "m")
    new = describe_file(tmp_path / f"new.{suffix}", "m")
    # the tensor itself, and the one chunk that its tail may share with small neighbours
    assert changed(old, new) <= weights["half"].nbytes + MIN_CHUNK_BYTES


def test_a_longer_header_moves_every_byte_and_changes_only_the_headers_chunk(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "old.safetensors")
    save_file(tensors(), tmp_path / "new.safetensors", metadata={"note": "x" * 1200})
    old = describe_file(tmp_path / "old.safetensors", "m")
    new = describe_file(tmp_path / "new.safetensors", "m")
    assert new.size_bytes > old.size_bytes
    assert changed(old, new) < 3 * KIB


def test_data_beside_an_onnx_file_is_cut_at_its_tensors(tmp_path: Path) -> None:
    weights = tensors()
    for version, folder in ((0, tmp_path / "old"), (1, tmp_path / "new")):
        folder.mkdir()
        save_onnx(folder / "model.onnx", {**weights, "half": weights["half"] + np.float16(version)}, external=True)
    old = {file.path: file for file in describe_folder(tmp_path / "old")}
    new = {file.path: file for file in describe_folder(tmp_path / "new")}
    assert set(old) == {"model.onnx", "model.onnx.data"}
    assert {chunk.element_bytes for chunk in old["model.onnx.data"].chunks} >= {2, 4}
    assert changed(old["model.onnx.data"], new["model.onnx.data"]) <= weights["half"].nbytes + MIN_CHUNK_BYTES


def test_an_unknown_file_is_cut_at_fixed_offsets(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(np.random.default_rng(0).bytes(600 * KIB))
    sizes = [chunk.size_bytes for chunk in describe_file(tmp_path / "data.npz", "data.npz").chunks]
    assert sizes == [256 * KIB, 256 * KIB, 88 * KIB]


@pytest.mark.parametrize("name", ["a.onnx", "b.gguf", "c.safetensors"])
def test_a_damaged_file_is_still_cut(tmp_path: Path, name: str) -> None:
    data = np.random.default_rng(0).bytes(300 * KIB)
    (tmp_path / name).write_bytes(data)
    file = describe_file(tmp_path / name, name)
    assert file.digest == sha256(data)
    assert len(file.chunks) == 2


def test_the_chunk_size_can_be_lowered_for_small_brokers(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "m.safetensors")
    file = describe_file(tmp_path / "m.safetensors", "m", chunk_bytes=64 * KIB)
    assert max(chunk.size_bytes for chunk in file.chunks) == 64 * KIB
    for wrong in (0, 63 * KIB, 257 * KIB, 64 * KIB + 1):
        with pytest.raises(InvalidInputError, match=str(wrong)):
            describe_folder(tmp_path, chunk_bytes=wrong)


def test_small_neighbours_share_a_chunk(tmp_path: Path) -> None:
    many = {f"t{n:03}": np.full(100, n, np.float32) for n in range(1000)}
    save_file(many, tmp_path / "m.safetensors")
    sizes = [chunk.size_bytes for chunk in describe_file(tmp_path / "m.safetensors", "m").chunks]
    assert len(sizes) < 10
    assert all(size >= MIN_CHUNK_BYTES for size in sizes[:-1])


def test_chunks_read_back_are_the_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "m.safetensors")
    file = describe_file(tmp_path / "m.safetensors", "m")
    assert b"".join(iter_chunks(tmp_path / "m.safetensors", file)) == (tmp_path / "m.safetensors").read_bytes()


def test_a_file_that_changed_meanwhile_is_not_read_as_if_it_had_not(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(100 * KIB))
    file = describe_file(path, "a.bin")
    path.write_bytes(bytes(99 * KIB) + b"x" * KIB)
    with pytest.raises(IntegrityError, match="changed"):
        list(iter_chunks(path, file))


def test_a_folder_is_described_by_path_with_progress(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_bytes(b"b")
    (tmp_path / "a.json").write_bytes(b"{}")
    (tmp_path / "empty").touch()
    seen: list[int] = []
    files = describe_folder(tmp_path, progress=seen.append)
    assert [file.path for file in files] == ["a.json", "empty", "sub/b.txt"]
    assert sum(seen) == 3
    assert files[1].chunks == []


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidInputError, match="link"):
        describe_folder(tmp_path)
    with pytest.raises(InvalidInputError, match="not a folder"):
        describe_folder(tmp_path / "absent")


def test_overlapping_or_outlying_spans_never_lose_or_double_a_byte() -> None:
    spans = [Span(10, 50, 2), Span(30, 10, 4), Span(60, 0, 4), Span(90, 20, 4)]
    regions = list(cover(spans, 100))
    assert [(r.offset, r.size_bytes, r.element_bytes) for r in regions] == [(0, 10, 1), (10, 50, 2), (60, 40, 1)]


def test_crumbs_join_the_chunk_before_them() -> None:
    regions = [Span(0, 100 * KIB, 4), Span(100 * KIB, 50, 1), Span(100 * KIB + 50, 100 * KIB, 4)]
    assert [span.size_bytes for span in cut(regions, 256 * KIB)] == [100 * KIB + 50, 100 * KIB]
