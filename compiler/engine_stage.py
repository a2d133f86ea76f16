"""The stage that puts a TensorRT engine beside the portable graph, or says why there is none.

The builder runs in a process of its own: what it does to itself costs this job a clear failure and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compiler.cache import Built, Stage
from compiler.targets import EngineTarget
from compiler.tensorrt import Builder, NoBuilder, find_builder
from compiler.tools import run_tool
from compiler.workshop import Workshop
from model_registry.manifest import Engine, Kind

ENGINE_FILE = "model.engine"
_NOT_LANGUAGE = "the language model's graph holds ONNX Runtime's own operators, which TensorRT does not read"


@dataclass(frozen=True)
class EngineResult:
    """The built engine and how the manifest describes it, or the reason why there is none."""

    built: Built | None = None
    description: Engine | None = None
    reason: str = ""


def add_engine(shop: Workshop, kind: Kind, wanted: EngineTarget, graph: Built) -> EngineResult:
    """Build the engine of `graph` that the target wants, if it can be built here."""
    builder: Builder | NoBuilder = NoBuilder(_NOT_LANGUAGE) if kind != "tensor" else find_builder(wanted.builder)
    if isinstance(builder, NoBuilder):
        shop.progress.skip("engine")
        return EngineResult(reason=builder.reason)
    model = graph.path("model.onnx")
    decided = {"graph": graph.files["model.onnx"], "engine": wanted.model_dump(), "version": builder.version}

    def build(to: Path) -> None:
        arguments = {
            "name": builder.name,
            "target": wanted.model_dump(),
            "onnx": str(model),
            "path": str(to / ENGINE_FILE),
        }
        run_tool("compiler.tensorrt:build_engine_here", arguments)

    stage = Stage("engine", decided, (), build, reproducibility="output-equivalent")
    capabilities = ", ".join(wanted.compute_capabilities)
    built = shop.run(stage, f"{builder.name} {builder.version} for {capabilities}")
    description = Engine(
        path=ENGINE_FILE,
        builder=wanted.builder,
        builder_version=builder.version,
        compute_capabilities=wanted.compute_capabilities,
    )
    return EngineResult(built, description)
