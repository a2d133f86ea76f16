"""When a device builds, what it can tell of its accelerator, and what lies on its shelf of engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.targets import EngineTarget
from compiler.tensorrt import Builder, build_engine, find_builder
from edge_agent.accelerator import find_accelerator
from edge_agent.build_conditions import Conditions, reason_not_to_build
from edge_agent.config import EngineSettings
from edge_agent.engine_runtime import EngineRefusedError, EngineRuntime, open_engine
from edge_agent.engine_shelf import EngineShelf
from edge_agent.runtimes.base import Array, Memory, TensorSpec
from edge_agent.runtimes.cuda_driver import CudaDriver, CudaError
from model_registry.manifest import EngineBuild, sha256
from tests.fakes.compiler_models import write_classifier
from wire.errors import IntegrityError, InvalidInputError

SETTINGS = EngineSettings(
    runtime="tensorrt", runtime_version="10.3.0", module="m", build=["trtexec"], min_idle_s=60, max_power_w=15
)
READY = Conditions(idle_s=61, is_updating=False, is_online=True, power_w=9.5)


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({}, {}, None),
        ({"idle_s": 59.0}, {}, "the last request was 59.0 s ago, 60 s of idle time are wanted"),
        ({"is_updating": True}, {}, "an update is under way"),
        ({"is_online": False}, {}, "the control plane cannot be reached"),
        ({"power_w": 15.1}, {}, "the board draws 15.1 W, the budget is 15 W"),
        ({"power_w": None}, {}, "there is a power budget and no sensor that tells the power"),
        ({"power_w": None}, {"max_power_w": None}, None),
        ({}, {"build": None}, "this device builds no engines"),
    ],
)
def test_a_device_builds_only_in_idle_time_and_within_its_power_budget(
    changes: dict[str, object], settings: dict[str, object], reason: str | None
) -> None:
    now = Conditions(**{**vars(READY), **changes})  # type: ignore[arg-type]
    assert reason_not_to_build(now, SETTINGS.model_copy(update=settings)) == reason


def test_a_jetson_tells_its_jetpack_and_what_onnxruntime_brings(tmp_path: Path) -> None:
    put(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    put(tmp_path, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64\n")
    put(tmp_path, "dev/nvhost-gpu", "")
    put(tmp_path, "ort/capi/libonnxruntime_providers_cuda.so", "")
    found = find_accelerator(tmp_path, tmp_path / "ort")
    assert (found.compute_capability, found.jetpack, found.driver) == ("8.7", "6.2", None)
    assert found.providers == ["CUDAExecutionProvider"]
    put(tmp_path, "etc/nv_tegra_release", "# R36 (release), REVISION: 3.0, GCID: 1\n")
    assert find_accelerator(tmp_path, tmp_path / "ort").jetpack == "6.0"


def test_a_library_without_its_hardware_is_no_provider(tmp_path: Path) -> None:
    put(tmp_path, "ort/capi/libonnxruntime_providers_cuda.so", "")
    put(tmp_path, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul\n")
    found = find_accelerator(tmp_path, tmp_path / "ort")
    assert (found.providers, found.driver, found.jetpack) == ([], "580.65.06", None)


def built(engine: bytes, **changes: object) -> EngineBuild:
    facts = {
        "tenant": "acme", "name": "tiny", "manifest": "a" * 64, "hardware_key": "k", "builder": "tensorrt",
        "builder_version": "10.3.0", "engine": sha256(engine), "size_bytes": len(engine), "built_by": "device:a",
        "built_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return EngineBuild(**{**facts, **changes})  # type: ignore[arg-type]


def test_the_shelf_gives_only_what_hashes_right_and_was_not_refused(tmp_path: Path) -> None:
    shelf, engine = EngineShelf(tmp_path), b"an engine"
    good, other = built(engine), built(engine, manifest="b" * 64)
    assert shelf.find("a" * 64, "k") is None
    for one in (good, other):
        shelf.accept(one).write_bytes(engine)
    assert shelf.find("a" * 64, "k") == good
    assert shelf.find("a" * 64, "another key") is None
    assert shelf.check(good).read_bytes() == engine
    shelf.keep({"a" * 64})
    assert not shelf.path(other.digest).exists()
    shelf.path(good.digest).write_bytes(b"AN ENGINE")
    with pytest.raises(IntegrityError, match="not what was signed"):
        shelf.check(good)
    assert shelf.find("a" * 64, "k") is None, "it is gone"
    shelf.accept(good).write_bytes(engine)
    shelf.refuse(good.digest, "engine_failed: 719")
    assert shelf.find("a" * 64, "k") is None
    assert shelf.refusal(good.digest) == "engine_failed: 719"


def test_a_document_that_was_changed_on_disk_is_no_document(tmp_path: Path) -> None:
    shelf, engine = EngineShelf(tmp_path), b"an engine"
    one = built(engine)
    shelf.accept(one).write_bytes(engine)
    document = shelf.path(one.digest).with_name("document.json")
    document.write_bytes(document.read_bytes().replace(b"device:a", b"device:b"))
    assert shelf.find("a" * 64, "k") is None


class Scaled:
    """A runtime that answers, or fails."""

    inputs = outputs = (TensorSpec("x", "FP32", (1,)),)

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.providers, self.error, self.is_closed = name, [name], error, False

    def infer(self, inputs: object, outputs: object = ()) -> dict[str, Array]:
        if self.error is not None:
            raise self.error
        return {"y": self.name}  # type: ignore[dict-item]

    def memory(self) -> Memory:
        return Memory(1, 0)

    def close(self) -> None:
        self.is_closed = True


def test_a_failing_engine_gives_way_once_and_the_request_is_answered() -> None:
    told: list[str] = []
    engine, portable = Scaled("tensorrt", RuntimeError("CUDA error 719")), Scaled("onnxruntime")
    num_opened = 0

    def open_portable() -> Scaled:
        nonlocal num_opened
        num_opened += 1
        return portable

    runtime = EngineRuntime(engine, open_portable, told.append)
    assert runtime.name == "tensorrt"
    assert [runtime.infer({})["y"] for _ in range(3)] == ["onnxruntime"] * 3
    assert (num_opened, runtime.name, runtime.providers) == (1, "onnxruntime", ["onnxruntime"])
    assert told == ["engine_failed: RuntimeError: CUDA error 719"]
    runtime.close()
    assert engine.is_closed
    assert portable.is_closed


def test_a_wrong_request_is_no_fault_of_the_engine() -> None:
    def never() -> Scaled:
        raise AssertionError("nothing is opened")

    engine = Scaled("tensorrt", InvalidInputError("no such input", remedy="send x"))
    runtime = EngineRuntime(engine, never, lambda reason: None)
    with pytest.raises(InvalidInputError):
        runtime.infer({})
    assert runtime.fallen is None


def test_what_a_runtime_says_of_an_engine_becomes_a_reason(tmp_path: Path) -> None:
    (tmp_path / "engine").write_bytes(b"not an engine")
    with pytest.raises(EngineRefusedError, match="magic tag does not match"):
        open_engine(SETTINGS.model_copy(update={"module": "tests.fakes.simulated_tensorrt"}), tmp_path / "engine")
    with pytest.raises(EngineRefusedError, match="No module named"):
        open_engine(SETTINGS.model_copy(update={"module": "no_such_module"}), tmp_path / "engine")


def test_the_real_rtx_runtime_refuses_its_own_engine_without_a_gpu_in_its_own_words(tmp_path: Path) -> None:
    builder = find_builder("tensorrt-rtx")
    assert isinstance(builder, Builder), builder
    target = EngineTarget(builder="tensorrt-rtx", compute_capabilities=["8.9"])
    build_engine(builder, target, write_classifier(tmp_path / "small.onnx"), tmp_path / "engine")
    settings = EngineSettings(runtime="tensorrt-rtx", runtime_version=builder.version)
    assert settings.module == "edge_agent.runtimes.tensorrt_engine"
    with pytest.raises(EngineRefusedError, match=r"tensorrt-rtx 1\..* does not take the engine: .*CUDA"):
        open_engine(settings, tmp_path / "engine")


def test_a_machine_without_a_driver_says_so() -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has one")
    with pytest.raises(CudaError, match=r"there is no CUDA driver|cuInit failed"):
        CudaDriver()
