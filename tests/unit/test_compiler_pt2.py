"""torch.export programs become ONNX files that compute the same; pickles, native code and foreign operators do not."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from compiler.pt2_import import import_pt2
from compiler.tensor_model import clean, run_batches
from model_registry.pt2_layout import read_pt2, write_plain
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
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net]:
    torch.manual_seed(0)
    net, path = Net().eval(), tmp_path_factory.mktemp("pt2") / "net.pt2"
    shapes = {"image": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes), path)
    return path, net


def rewritten(source: Path, out: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> Path:
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w") as copy:
        for info in archive.infolist():
            copy.writestr(info.filename, change(info.filename, archive.read(info)))
        for name, content in more.items():
            copy.writestr(f"net/{name}", content)
    return out


def test_a_program_becomes_an_onnx_file_that_computes_the_same(saved: tuple[Path, Net], tmp_path: Path) -> None:
    path, net = saved
    layout = import_pt2(path, tmp_path / "model.onnx")
    assert "torch.ops.aten.conv2d.default" in layout.operators
    assert layout.num_weights == 4
    image = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)
    (found,) = run_batches(tmp_path / "model.onnx", {"image": image}).values()
    np.testing.assert_allclose(found, net(torch.from_numpy(image)).detach().numpy(), atol=1e-5)
    with pytest.raises(ConflictError):
        import_pt2(path, tmp_path / "model.onnx")


def test_publishing_one_says_how_to_import_it(saved: tuple[Path, Net]) -> None:
    with pytest.raises(UnsupportedModelError, match="foreshore import"):
        recognise(saved[0])


def test_the_copy_that_is_opened_holds_no_pickle(saved: tuple[Path, Net], tmp_path: Path) -> None:
    trapped = rewritten(
        saved[0],
        tmp_path / "t.pt2",
        lambda name, old: pickle.dumps(Trap(tmp_path / "sprung")) if name.endswith("model.pt") else old,
    )
    write_plain(trapped, tmp_path / "plain.pt2")
    with zipfile.ZipFile(tmp_path / "plain.pt2") as archive:
        assert [archive.read(name) for name in archive.namelist() if name.endswith(".pt")] == [b""]
    import_pt2(trapped, tmp_path / "model.onnx")
    assert not (tmp_path / "sprung").exists()


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
    saved: tuple[Path, Net], tmp_path: Path, change: Callable[[str, bytes], bytes], match: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        read_pt2(rewritten(saved[0], tmp_path / "bad.pt2", change))


@pytest.mark.parametrize("name", ["data/aotinductor/model/a.so", "data/constants/custom_obj_0", "code/model.py"])
def test_an_entry_of_another_kind_is_refused(saved: tuple[Path, Net], tmp_path: Path, name: str) -> None:
    bad = rewritten(saved[0], tmp_path / "bad.pt2", lambda _, old: old, **{name: b"\x80\x04."})
    with pytest.raises(UnsupportedModelError, match="not plain data"):
        read_pt2(bad)


def test_a_torch_save_file_under_that_name_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    (tmp_path / "weights.pt2").write_bytes(buffer.getvalue())
    with pytest.raises(UnsupportedModelError):
        recognise(tmp_path / "weights.pt2")


def test_an_unknown_onnx_operator_is_refused_by_its_name(tmp_path: Path) -> None:
    content = write_classifier(tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(content.replace(b"GlobalAveragePool", b"GlobalAveragePoop"))
    with pytest.raises(UnsupportedModelError, match="GlobalAveragePoop"):
        clean(tmp_path / "m.onnx", tmp_path / "out.onnx")
