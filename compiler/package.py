"""Putting an artefact together: parts from the stages, the filled recipe, and the manifest that describes them.

Describing files (cutting and hashing, reading what the graph asks of a runtime) is the costly part, so it is a stage by
the parts' digests; targets that share a graph share it. The output folder holds copies: whoever changes them harms no
cache.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.cache import Stage
from compiler.graph_facts import read_graph
from compiler.tools import versions_of
from compiler.workshop import Workshop
from model_registry.chunking import describe_file, describe_folder
from model_registry.manifest import ArtefactFile, Graph, Manifest, Requirements

RECIPE_FILE = "recipe.json"
_TOOLS = ("gguf", "onnx", "onnxruntime", "onnxruntime-genai", "onnxslim", "torch", "transformers")


@dataclass(frozen=True)
class Part:
    """A file of the artefact: its name there, where it lies now, and a digest that names its content."""

    name: str
    path: Path
    digest: str


def package(
    shop: Workshop,
    parts: Sequence[Part],
    recipe: Mapping[str, Any],
    out: Path,
    *,
    entry: str,
    requires: Requirements,
    **more: Any,
) -> Manifest:
    """Write the artefact into the folder `out` (new) and return its manifest; `more` are the manifest's own fields."""
    listed = {part.name: part.digest for part in parts}

    def build(to: Path) -> None:
        for part in parts:
            _link(part.path, to / "files" / part.name)
        described = describe_folder(to / "files")
        graph = read_graph(to / "files", entry)
        shutil.rmtree(to / "files")
        (to / "files.json").write_text(json.dumps([file.model_dump(mode="json") for file in described]))
        (to / "graph.json").write_text(graph.model_dump_json())

    stage = Stage("package", {"files": listed, "entry": entry}, ("onnx",), build)
    built = shop.run(stage, "cutting into chunks")
    files = [ArtefactFile.model_validate(file) for file in built.read_json("files.json")]
    text = json.dumps(recipe, indent=1, sort_keys=True)
    out.mkdir(parents=True)
    for part in parts:
        target = out / part.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part.path, target)
    (out / RECIPE_FILE).write_text(text)
    files = sorted([*files, describe_file(out / RECIPE_FILE, RECIPE_FILE)], key=lambda file: file.path)
    requires = requires.model_copy(update={"disk_bytes": sum(file.size_bytes for file in files)})
    graph = Graph.model_validate(built.read_json("graph.json"))
    return Manifest(files=files, entry=entry, graph=graph, requires=requires, tools=versions_of(_TOOLS), **more)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
