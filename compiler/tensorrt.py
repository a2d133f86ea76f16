"""TensorRT engines from portable ONNX, where the TensorRT package of the target's builder is installed.

TensorRT-RTX builds for other devices' compute capabilities without a GPU; classic TensorRT (Jetson, data centre) builds
only on a machine that has the device, so here its targets yield the portable graph and recipe alone. The graph is
strongly typed: precision is what the ONNX says. An engine is bound to its builder's version and is never loaded here.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.targets import EngineTarget
from compiler.tools import ToolCrashedError, ToolError, run_tool, version_of
from wire.errors import ForeshoreError, UnsupportedModelError

MODULES = {"tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt": ("tensorrt",)}
DISTRIBUTIONS = {"tensorrt-rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"), "tensorrt": ("tensorrt",)}
LOG_LINES = 20


@dataclass(frozen=True)
class Builder:
    """A builder that can work here."""

    name: str
    module_name: str
    version: str

    def load(self) -> Any:
        """Its Python module; several hundred megabytes of libraries come with it."""
        return importlib.import_module(self.module_name)


@dataclass(frozen=True)
class NoBuilder:
    """Why no engine is built here; the artefact says it too."""

    reason: str


class EngineBuildError(ForeshoreError):
    """TensorRT could not build an engine from a graph that it accepted."""

    code = "engine_build_failed"


def find_builder(name: str) -> Builder | NoBuilder:
    """The builder `name` if its package is installed and works without what this machine lacks. Nothing is loaded."""
    for module_name in MODULES[name]:
        if importlib.util.find_spec(module_name) is None:
            continue
        version = next((v for v in map(version_of, DISTRIBUTIONS[name]) if v != "absent"), "unknown")
        if name == "tensorrt" and not _has_device(module_name):
            return NoBuilder("classic TensorRT builds only where the device is; this machine has none")
        return Builder(name, module_name, version)
    return NoBuilder(f"{name} is not installed here (pip install 'foreshore[tensorrt]')")


def build_engine_here(name: str, target: dict[str, Any], onnx: str, path: str) -> None:
    """`build_engine` with plain arguments, for a process of its own."""
    builder = find_builder(name)
    if isinstance(builder, NoBuilder):
        raise EngineBuildError(builder.reason, remedy="compile where the builder is")
    build_engine(builder, EngineTarget.model_validate(target), Path(onnx), Path(path))


def build_engine(builder: Builder, target: EngineTarget, onnx: Path, path: Path) -> None:
    """Write the engine of `onnx` for every compute capability of `target` to `path`.

    A free axis is built for 1 to `target.max_batch`, tuned for 1. Raises `UnsupportedModelError` with the parser's
    words for a graph that TensorRT does not take, `EngineBuildError` when the build itself fails.
    """
    trt = builder.load()
    log = _log(trt)
    maker = trt.Builder(log)
    network = maker.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        words = "; ".join(str(parser.get_error(number).desc()) for number in range(parser.num_errors))
        raise UnsupportedModelError(
            f"{builder.name} does not take the graph: {words[:500]}", remedy="compile for another target"
        )
    config = maker.create_builder_config()
    if builder.name == "tensorrt-rtx":
        _set_capabilities(trt, config, target.compute_capabilities)
    _set_shapes(maker, config, network, target.max_batch)
    engine = maker.build_serialized_network(network, config)
    if engine is None:
        raise EngineBuildError(
            f"{builder.name} {builder.version} built no engine: {'; '.join(log.lines)[-500:]}",
            remedy="leave the target out or report the graph",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(memoryview(engine))


def _set_capabilities(trt: Any, config: Any, capabilities: list[str]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        kind = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
        if kind is None or not config.set_compute_capability(kind, index):
            raise UnsupportedModelError(
                f"this TensorRT does not build for compute capability {capability}", remedy="change the target file"
            )


def _set_shapes(maker: Any, config: Any, network: Any, max_batch: int) -> None:
    """One optimisation profile in which each free axis goes from 1 to `max_batch`."""
    profile, has_free_axis = maker.create_optimization_profile(), False
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = list(tensor.shape)
        has_free_axis |= any(size < 0 for size in shape)
        small = [1 if size < 0 else size for size in shape]
        large = [max_batch if size < 0 else size for size in shape]
        profile.set_shape(tensor.name, small, small, large)
    if has_free_axis:
        config.add_optimization_profile(profile)


def _has_device(module_name: str) -> bool:
    try:
        return bool(run_tool("compiler.tensorrt:can_build", {"module_name": module_name}))
    except (ToolCrashedError, ToolError):
        return False


def can_build(module_name: str) -> bool:
    """Whether the module's builder can be made here; classic TensorRT's cannot without a device."""
    module = importlib.import_module(module_name)
    try:
        return module.Builder(module.Logger(module.Logger.ERROR)) is not None
    except (RuntimeError, TypeError):
        return False


def _log(trt: Any) -> Any:
    """A TensorRT logger that keeps warnings and errors for the job's failure, and prints them to its log."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.lines = [*self.lines, message][-LOG_LINES:]

    return Log()
