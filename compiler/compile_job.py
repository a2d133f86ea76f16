"""What is to be compiled, and what a model is between being judged and being packaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.cache import Built, Stage
from compiler.fingerprint import fingerprint_source
from compiler.package import Part
from compiler.recipe import Recipe
from compiler.targets import Target
from compiler.workshop import Workshop
from model_registry.manifest import GateResult, Golden, Kind, RuntimeChoice, Vision

RUNTIME_OVERHEAD_BYTES = 96 << 20


@dataclass(frozen=True)
class CompileJob:
    """What to compile: `source` is an ONNX, GGUF or torch.export file or a Hugging Face style folder.

    `data` (.npz, one array per input) are typical inputs of a tensor model, for calibration and gates.
    """

    name: str
    kind: Kind
    target: Target
    recipe: Recipe
    source_format: str
    source: Path
    source_digest: str
    golden: Path | None = None
    vision: Vision | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Tried:
    """A graph that was built and judged on the way, whether it was taken or not."""

    label: str
    size_bytes: int
    gates: tuple[GateResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        gates = [gate.model_dump() for gate in self.gates]
        return {"label": self.label, "size_bytes": self.size_bytes, "gates": gates}


@dataclass(frozen=True)
class BuiltModel:
    """A built and judged model before packaging; `notes` say what a reader of the recipe would not expect."""

    parts: list[Part]
    graph: Built
    runtime: str
    precision: str
    entry: str
    gates: list[GateResult]
    golden: Golden
    vision: Vision | None
    context_tokens: int
    memory_bytes: int
    notes: tuple[str, ...]
    tried: tuple[Tried, ...]
    runtime_choice: RuntimeChoice | None = None  # of tensor models it waits for the engine


def fingerprint(job: CompileJob, path: Path, shop: Workshop, digest: str) -> str:
    """The model's name in keys. It is a function of the source's bytes, so those name the stage."""
    source_format = "onnx" if job.kind == "tensor" else "huggingface"  # what imports end as

    def build(to: Path) -> None:
        (to / "fingerprint.json").write_text(json.dumps(fingerprint_source(source_format, path).to_dict()))

    tools = ("onnx",) if source_format == "onnx" else ()
    stage = Stage("fingerprint", {"source": digest, "format": source_format}, tools, build)
    return str(shop.run(stage, "reading the model").read_json("fingerprint.json")["digest"])


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
