"""A torch.export program through the real command line, control plane and compile worker to a signed release."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compiler.tensor_model import run_batches  # noqa: E402
from model_registry.client import connect  # noqa: E402
from model_registry.manifest import parse_manifest  # noqa: E402
from tests.fakes.control import ControlProcess  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = torch.nn.Linear(6, 16), torch.nn.Linear(16, 5)

    def forward(self, features: Any) -> Any:
        return self.head(self.hidden(features).relu())


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def rewrite(source: Path, out: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w") as copy:
        for info in archive.infolist():
            copy.writestr(info.filename, change(info.filename, archive.read(info)))


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    control = ControlProcess(tmp_path / "control")
    control.start()
    yield control
    control.stop()


def foreshore(control: ControlProcess, token: str, *words: object) -> subprocess.Popen[str]:
    address = ["--url", control.url, "--token-file", str(control.home / "tokens" / token)]
    command = [sys.executable, "-m", "cloud.cli", *map(str, words), *address]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def publish(control: ControlProcess, path: Path) -> subprocess.Popen[str]:
    key = control.home / "offline" / "publisher.pem"
    return foreshore(
        control, "admin", "publish", path, "--name", "tabular", "--targets", "cpu-reference", "--key", key, "--json"
    )


def test_a_program_is_published_and_its_artefact_computes_the_same(control: ControlProcess, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, path = Net().eval(), tmp_path / "net.pt2"
    shapes = {"features": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(net, (torch.randn(2, 6),), dynamic_shapes=shapes), tmp_path / "plain.pt2")
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    rewrite(tmp_path / "plain.pt2", path, lambda name, old: trap if name.endswith("sample_inputs/model.pt") else old)
    worker = foreshore(control, "worker", "worker", "--home", tmp_path / "worker", "--num-jobs", 1)
    said, log = publish(control, path).communicate(timeout=240)
    _, worker_log = worker.communicate(timeout=60)
    assert said, (log, worker_log)
    published = json.loads(said.splitlines()[-1])
    assert published["is_released"]
    (artefact,) = published["artefacts"]
    with connect(control.url, control.token()) as client:
        client.download_blob(artefact["manifest"], tmp_path / "manifest.json", max_bytes=1 << 20)
        manifest = parse_manifest((tmp_path / "manifest.json").read_bytes(), expected_digest=artefact["manifest"])
        model = next(file for file in manifest.files if file.path == manifest.entry)
        with (tmp_path / "model.onnx").open("wb") as file:
            for chunk in model.chunks:
                client.download_blob(chunk.digest, tmp_path / "chunk", max_bytes=chunk.size_bytes)
                file.write((tmp_path / "chunk").read_bytes())
    features = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    (found,) = run_batches(tmp_path / "model.onnx", {"features": features}).values()
    assert not (tmp_path / "sprung").exists()
    np.testing.assert_allclose(found, net(torch.from_numpy(features)).detach().numpy(), atol=1e-5)

    rewrite(path, tmp_path / "bad.pt2", lambda _, old: old.replace(b"ops.aten.relu", b"ops.acme.relu"))
    refused = publish(control, tmp_path / "bad.pt2")
    said, log = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "torch.ops.acme.relu.default" in said + log
