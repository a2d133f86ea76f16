"""torch.export programs are plain data; pickles, native code, foreign operators and bombs are not.

That one becomes an ONNX file that computes the same, whoever trapped its sample inputs: tests/e2e/test_publish_program.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from copy import copy
from pathlib import Path

import pytest
import torch

from compiler.pt2_import import import_pt2
from compiler.tensor_model import clean
from model_registry.pt2_layout import MAX_BYTES, MAX_DIRECTORY_BYTES, read_pt2, write_plain
from model_registry.sources import recognise
from tests.fakes.compiler_models import write_classifier
from wire.errors import ConflictError, UnsupportedModelError


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.conv(image).relu().mean((2, 3))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net, path = Net().eval(), tmp_path_factory.mktemp("pt2") / "net.pt2"
    shapes = {"image": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes), path)
    return path


def rewritten(source: Path, out: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> Path:
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w") as target:
        for info in archive.infolist():
            target.writestr(info.filename, change(info.filename, archive.read(info)))
        for name, content in more.items():
            target.writestr(f"net/{name}", content)
    return out


def test_operators_and_weights_are_read_without_torch(saved: Path) -> None:
    layout = read_pt2(saved)
    assert "torch.ops.aten.conv2d.default" in layout.operators
    assert layout.num_weights == 4


@pytest.mark.parametrize("name", ["net.pt2", "net.pt", "net"])
def test_a_program_is_recognised_by_its_content(saved: Path, tmp_path: Path, name: str) -> None:
    shutil.copyfile(saved, tmp_path / name)
    source = recognise(tmp_path / name)
    assert (source.format, source.kind, [file.path for file in source.files]) == ("pt2", "tensor", [name])
    assert "4 weights" in source.summary


def test_the_copy_that_is_opened_holds_no_pickle(saved: Path, tmp_path: Path) -> None:
    trapped = rewritten(
        saved,
        tmp_path / "t.pt2",
        lambda name, old: pickle.dumps(Trap(tmp_path / "sprung")) if name.endswith("model.pt") else old,
    )
    write_plain(trapped, tmp_path / "plain.pt2")
    with zipfile.ZipFile(tmp_path / "plain.pt2") as archive:
        assert [archive.read(name) for name in archive.namelist() if name.endswith(".pt")] == [b""]
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ConflictError):
        import_pt2(trapped, tmp_path / "model.onnx")


def _mark_pickled(name: str, old: bytes) -> bytes:
    if not name.endswith("model_weights_config.json"):
        return old
    document = json.loads(old)
    document["config"]["conv.weight"]["use_pickle"] = True
    return json.dumps(document).encode()


def _script_object(name: str, old: bytes) -> bytes:
    if not name.endswith("model_constants_config.json"):
        return old
    entry = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    return json.dumps({"config": {"thing": entry}}).encode()


def _foreign_operator(name: str, old: bytes) -> bytes:
    return old.replace(b"torch.ops.aten.relu.default", b"torch.ops.acme.relu.default")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_mark_pickled, r"'conv\.weight' is stored as a pickle"),
        (_script_object, "'thing' is stored as a pickle"),
        (_foreign_operator, r"unknown operators: torch\.ops\.acme\.relu\.default"),
        (lambda name, old: b"{" if name.endswith("model.json") else old, "not a readable torch.export archive"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_its_name(
    saved: Path, tmp_path: Path, change: Callable[[str, bytes], bytes], match: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        read_pt2(rewritten(saved, tmp_path / "bad.pt2", change))


@pytest.mark.parametrize("name", ["data/aotinductor/model/a.so", "data/constants/custom_obj_0", "code/model.py"])
def test_an_entry_of_another_kind_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    bad = rewritten(saved, tmp_path / "bad.pt2", lambda _, old: old, **{name: b"\x80\x04."})
    with pytest.raises(UnsupportedModelError, match="not plain data"):
        read_pt2(bad)


def test_sizes_are_limited_before_anything_is_parsed(saved: Path, tmp_path: Path) -> None:
    with (tmp_path / "large.pt2").open("wb") as file:
        file.write(saved.read_bytes())
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UnsupportedModelError, match=f"at most {MAX_BYTES}"):
        recognise(tmp_path / "large.pt2")
    content = bytearray(saved.read_bytes())
    end = content.rfind(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", MAX_DIRECTORY_BYTES + 1)
    (tmp_path / "listing.pt2").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="list of entries"):
        read_pt2(tmp_path / "listing.pt2")


def test_entries_that_share_bytes_are_refused(saved: Path, tmp_path: Path) -> None:
    path = shutil.copyfile(saved, tmp_path / "bomb.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        weight = next(info for info in archive.infolist() if info.filename.endswith("/weight_0"))
        for number in range(100, 1100):  # listed once more, each from the same place
            again = copy(weight)
            again.filename = weight.filename.replace("weight_0", f"weight_{number}")
            again.file_size = again.compress_size = 1 << 20
            archive.filelist.append(again)
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match="overlap"):
        read_pt2(path)


def test_a_torch_save_file_under_that_name_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    (tmp_path / "weights.pt2").write_bytes(buffer.getvalue())
    with pytest.raises(UnsupportedModelError, match=r"data\.pkl.*not plain data"):
        recognise(tmp_path / "weights.pt2")


def test_an_unknown_onnx_operator_is_refused_by_its_name(tmp_path: Path) -> None:
    content = write_classifier(tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(content.replace(b"GlobalAveragePool", b"GlobalAveragePoop"))
    with pytest.raises(UnsupportedModelError, match="GlobalAveragePoop"):
        clean(tmp_path / "m.onnx", tmp_path / "out.onnx")
