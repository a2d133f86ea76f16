"""What may be published, and the sentence that each other thing gets."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from model_registry.gguf_layout import read_gguf
from model_registry.onnx_layout import read_onnx
from model_registry.safetensors_layout import read_safetensors
from model_registry.sources import SourceFile, hash_source, recognise, source_digest
from tests.unit.test_registry_chunking import save_gguf, save_onnx, tensors
from wire.errors import IntegrityError, UnsupportedModelError


def save_folder(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (path / "tokenizer.json").write_text("{}")
    (path / ".gitattributes").write_text("ignored")
    (path / "picture.png").write_bytes(b"ignored")
    save_file(tensors(), path / "model.safetensors")
    return path


def test_an_onnx_file_is_recognised(tmp_path: Path) -> None:
    save_onnx(tmp_path / "m.onnx", tensors())
    source = recognise(tmp_path / "m.onnx")
    assert (source.format, source.kind) == ("onnx", "tensor")
    assert [file.path for file in source.files] == ["m.onnx"]
    assert "operator set 21, 4 nodes" in source.summary


def test_an_onnx_file_brings_its_external_data(tmp_path: Path) -> None:
    save_onnx(tmp_path / "m.onnx", tensors(), external=True)
    assert [file.path for file in recognise(tmp_path / "m.onnx").files] == ["m.onnx", "m.onnx.data"]


def test_missing_or_truncated_external_data_is_named(tmp_path: Path) -> None:
    save_onnx(tmp_path / "m.onnx", tensors(), external=True)
    data = tmp_path / "m.onnx.data"
    with data.open("rb+") as file:
        file.truncate(data.stat().st_size - 1)
    with pytest.raises(UnsupportedModelError, match=r"m\.onnx\.data is truncated"):
        recognise(tmp_path / "m.onnx")
    data.unlink()
    with pytest.raises(UnsupportedModelError, match="not beside it"):
        recognise(tmp_path / "m.onnx")


def test_external_data_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_onnx(tmp_path / "m.onnx", tensors(), external=True)
    for place in (b"../../etc/p", b"/etc/passwd"):
        data = (tmp_path / "m.onnx").read_bytes().replace(b"m.onnx.data", place)
        (tmp_path / "evil.onnx").write_bytes(data)
        with pytest.raises(UnsupportedModelError, match="outside of its folder"):
            recognise(tmp_path / "evil.onnx")


def test_a_gguf_file_is_recognised_by_its_content(tmp_path: Path) -> None:
    weights = {name: value for name, value in tensors().items() if name != "bytes"}
    save_gguf(tmp_path / "m.gguf", weights)
    (tmp_path / "m.gguf").rename(tmp_path / "no-suffix")
    source = recognise(tmp_path / "no-suffix")
    assert (source.format, source.kind) == ("gguf", "language")
    assert source.summary == "GGUF 3, llama, 3 tensors"


def test_a_model_folder_is_recognised_without_what_does_not_matter(tmp_path: Path) -> None:
    source = recognise(save_folder(tmp_path / "m"))
    assert (source.format, source.kind) == ("huggingface", "language")
    assert [file.path for file in source.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert source.summary == "llama, 4 tensors in 1 files"


@pytest.mark.parametrize("name", ["m.onnx", "m.gguf"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    weights = {name: value[:64] for name, value in tensors().items() if name != "bytes"}
    save_onnx(tmp_path / name, weights) if name == "m.onnx" else save_gguf(tmp_path / name, weights)
    data = (tmp_path / name).read_bytes()
    for size in sorted(
        {0, 1, 4, 30, len(data) // 3, len(data) // 2, len(data) - 40}
    ):  # the last bytes of a GGUF may be padding
        (tmp_path / name).write_bytes(data[:size])
        with pytest.raises(UnsupportedModelError):
            recognise(tmp_path / name)


def test_a_folder_with_truncated_weights_is_refused(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "m")
    os.truncate(path / "model.safetensors", 1000)
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors"):
        recognise(path)


@pytest.mark.parametrize("suffix", ["pth", "bin", "pkl", "onnx", "weights"])
def test_a_pickle_is_refused_whatever_its_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"m.{suffix}").write_bytes(pickle.dumps({"weights": [1.0]}))
    with pytest.raises(UnsupportedModelError, match=r"pickle.*ONNX"):
        recognise(tmp_path / f"m.{suffix}")


def test_a_zip_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=np.zeros(3))
    (tmp_path / "m.npz").rename(tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match="archive"):
        recognise(tmp_path / "m.onnx")


def test_a_folder_of_pickles_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="safe_serialization"):
        recognise(path)


def test_a_pickle_beside_the_safetensors_is_left_behind(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "m")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pytorch_model.bin" not in [file.path for file in recognise(path).files]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_its_own_code_is_refused(tmp_path: Path, name: str) -> None:
    path = save_folder(tmp_path / "m")
    (path / name).write_text(json.dumps({"model_type": "x", "auto_map": {"AutoModel": "m.Model"}}))
    with pytest.raises(UnsupportedModelError, match=f"{name}.*auto_map"):
        recognise(path)


@pytest.mark.parametrize(
    ("missing", "says"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "no safetensors")],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, missing: str, says: str) -> None:
    path = save_folder(tmp_path / "m")
    (path / missing).unlink()
    with pytest.raises(UnsupportedModelError, match=says):
        recognise(path)


def test_a_folder_that_holds_an_onnx_file_says_which_path_to_give(tmp_path: Path) -> None:
    save_onnx(tmp_path / "m.onnx", tensors())
    with pytest.raises(UnsupportedModelError, match=r"give .*m\.onnx itself"):
        recognise(tmp_path)


def test_parts_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"big": "model.safetensors", "x": "model-2.safetensors"}}))
    with pytest.raises(UnsupportedModelError, match=r"model-2\.safetensors is missing"):
        recognise(path)
    index.write_text(json.dumps({"weight_map": {"big": "model.safetensors", "lost": "model.safetensors"}}))
    with pytest.raises(UnsupportedModelError, match="'lost'"):
        recognise(path)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(UnsupportedModelError, match="names no files"):
        recognise(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"model_type": 3}'])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    path = save_folder(tmp_path / "m")
    (path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        recognise(path)


def test_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.onnx").touch()
    save_file(tensors(), tmp_path / "alone.safetensors")
    for name, says in (
        ("notes.txt", "no format"),
        ("empty.onnx", "is empty"),
        ("alone.safetensors", "weights alone"),
        ("absent", "does not exist"),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            recognise(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "entries"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "length"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture"),
    ],
)
def test_a_hostile_gguf_is_refused_cheaply(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=says):
        recognise(tmp_path / "m.gguf")


def test_a_hostile_safetensors_header_is_refused_cheaply(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for header in (struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{x"):
        path.write_bytes(header)
        with pytest.raises(UnsupportedModelError):
            read_safetensors(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 20), value=st.integers(0, 255), size=st.integers(0, 1 << 20))
@pytest.mark.parametrize("name", ["m.onnx", "m.gguf", "m.safetensors"])
def test_no_damage_makes_a_reader_fall(tmp_path: Path, name: str, place: int, value: int, size: int) -> None:
    original = tmp_path / f"original-{name}"
    if not original.exists():
        weights = {name: array[:4] for name, array in tensors().items() if name != "bytes"}
        {"m.onnx": save_onnx, "m.gguf": save_gguf, "m.safetensors": lambda p, w: save_file(w, p)}[name](
            original, weights
        )
    data = bytearray(original.read_bytes())
    data[place % min(len(data), 2000)] = value
    (tmp_path / name).write_bytes(data[: size % (len(data) * 4)])
    reader: Any = {"m.onnx": read_onnx, "m.gguf": read_gguf, "m.safetensors": read_safetensors}[name]
    try:
        layout = reader(tmp_path / name)
    except UnsupportedModelError:
        return
    assert all(span.offset + span.size_bytes <= len(data) for span in layout.spans)


def test_a_source_is_named_by_its_format_and_content_not_by_its_folder(tmp_path: Path) -> None:
    one = hash_source(recognise(save_folder(tmp_path / "one")))
    two = hash_source(recognise(save_folder(tmp_path / "two")))
    assert one.digest == two.digest == source_digest("huggingface", tuple(reversed(one.files)))
    assert one.digest != source_digest("gguf", one.files)
    assert one.digest != source_digest("huggingface", [SourceFile("x", one.files[0].digest, 1), *one.files[1:]])


def test_hashing_tells_its_progress_and_notices_a_change(tmp_path: Path) -> None:
    source = recognise(save_folder(tmp_path / "m"))
    seen: list[int] = []
    hash_source(source, seen.append)
    assert sum(seen) == source.size_bytes
    (tmp_path / "m" / "tokenizer.json").write_text("{ }")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        hash_source(source)
