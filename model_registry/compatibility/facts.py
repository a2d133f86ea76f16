"""What decides whether an artefact runs, gathered from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model_registry.manifest import Engine, Manifest


@dataclass(frozen=True)
class EngineFacts:
    """An engine: who built it, for what. `system` and `architecture` None: of any."""

    builder: str
    version: str
    compute_capabilities: tuple[str, ...]
    jetpack: str | None = None
    architecture: str | None = None
    is_version_compatible: bool = False


@dataclass(frozen=True)
class ArtefactFacts:
    """Everything the rules ask of an artefact. Empty and None: it says nothing, so nothing is asked of the device."""

    runtime: str
    runtime_version: str | None = None  # lowest that loads it
    architectures: tuple[str, ...] = ()
    cpu_features: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()  # one of these must be there
    memory_bytes: int = 0
    disk_bytes: int = 0
    hardware_key: str | None = None
    ir_version: int | None = None
    opsets: Mapping[str, int] = field(default_factory=dict)  # operator domain -> version
    operators: tuple[str, ...] = ()  # outside ONNX's own domains: "com.microsoft.GroupQueryAttention[qk_norm]"
    formats: frozenset[str] = frozenset()  # of numbers in the graph; see `manifest.NumberFormat`
    declines_engines: bool = False  # its recipe chose ONNX Runtime
    engine: EngineFacts | None = None  # what the runtime opens is this engine


def facts_of(manifest: Manifest) -> ArtefactFacts:
    """The facts of what the runtime opens; an engine that lies beside a portable graph is none of them."""
    needs, graph = manifest.requires, manifest.graph
    is_engine = manifest.engine is not None and manifest.engine.path == manifest.entry
    return ArtefactFacts(
        runtime=manifest.runtime,
        runtime_version=needs.runtime_version,
        architectures=tuple(needs.architectures),
        cpu_features=tuple(needs.cpu_features),
        providers=tuple(needs.providers or ()),
        memory_bytes=needs.memory_bytes,
        disk_bytes=needs.disk_bytes,
        hardware_key=needs.hardware_key,
        ir_version=graph.ir_version if graph else None,
        opsets=graph.opsets if graph else {},
        operators=tuple(graph.operators) if graph else (),
        formats=frozenset(graph.formats) if graph else frozenset(),
        declines_engines=_declines_engines(manifest),
        engine=engine_facts(manifest.engine) if is_engine and manifest.engine else None,
    )


def _declines_engines(manifest: Manifest) -> bool:
    choice = manifest.runtime_choice
    return choice is not None and choice.basis == "recipe" and choice.chosen.runtime == "onnxruntime"


def engine_facts(engine: Engine) -> EngineFacts:
    """The facts of an engine as a manifest names it."""
    return EngineFacts(
        builder=engine.builder,
        version=engine.builder_version,
        compute_capabilities=tuple(engine.compute_capabilities),
    )
