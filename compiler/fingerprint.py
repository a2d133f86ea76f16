"""What a source model is, apart from how it is written down: the first part of every build key.

ONNX: each value is named by the operator, attributes and inputs that make it, from the inputs of the graph to its
outputs. Order of nodes, their names and those of inner values, documentation, producer, dead nodes, and whether a
weight is stored raw, typed or beside the file do not count; anything that can change an output does. Hugging Face
folders: tensors by name, type, shape and bytes whatever file holds them, JSON by content, other tokenizer files by
bytes. The structure is also digested without the weights' values, so that a record tells which of the two changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_registry.manifest import canonical_bytes, sha256
from model_registry.safetensors_layout import read_safetensors
from wire.errors import IntegrityError, UnsupportedModelError

_READ_BYTES = 1 << 20
_CONFIG_NOISE = ("_name_or_path", "transformers_version")  # who saved it, not what it is
_CONTENT_SUFFIXES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class Fingerprint:
    """`digest` names the model in build keys; `structure` is the same without the weights' values."""

    digest: str
    structure: str

    def to_dict(self) -> dict[str, str]:
        """As a stage's record holds it."""
        return {"digest": self.digest, "structure": self.structure}


def fingerprint_source(source_format: str, path: Path) -> Fingerprint:
    """The fingerprint of an ONNX file or a Hugging Face folder."""
    return fingerprint_onnx(path) if source_format == "onnx" else fingerprint_folder(path)


def fingerprint_onnx(path: Path) -> Fingerprint:
    """Read the graph with its weights. A file that is no graph raises `UnsupportedModelError`."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path))
    except (DecodeError, ValueError, OSError, onnx.checker.ValidationError) as error:
        raise UnsupportedModelError(
            f"{path.name} is not a sound ONNX graph: {error}", remedy="export it again"
        ) from error
    opsets = sorted((entry.domain or "ai.onnx", entry.version) for entry in model.opset_import)
    digests = [
        _digest("model", opsets, model.ir_version, _GraphReader(_functions(model), has_values).read(model.graph, {}))
        for has_values in (True, False)
    ]
    return Fingerprint(*digests)


class _GraphReader:
    """Names every value by what makes it; weights by type, shape and, if `has_values`, their numbers."""

    def __init__(self, functions: Mapping[tuple[str, str], str], has_values: bool) -> None:
        self._functions = functions
        self._has_values = has_values

    def read(self, graph: Any, outer: Mapping[str, str]) -> str:
        """The digest of `graph` where `outer` names the values around it."""
        names = dict(outer) | {"": "absent"}
        is_inner = bool(outer)
        inputs = []
        for place, value in enumerate(graph.input):
            inputs.append(_digest("input", len(outer), place, "" if is_inner else value.name, _bytes(value.type)))
            names[value.name] = inputs[-1]
        for tensor in graph.initializer:
            names[tensor.name] = self._weight(tensor)
        for sparse in graph.sparse_initializer:
            names[sparse.values.name] = _digest("sparse", _bytes(sparse))
        self._name_values(graph, names)
        outputs = [
            ["" if is_inner else value.name, names.get(value.name, "missing"), _bytes(value.type)]
            for value in graph.output
        ]
        return _digest("graph", inputs, outputs)

    def _name_values(self, graph: Any, names: dict[str, str]) -> None:
        pending = list(graph.node)
        while pending:
            waiting = [node for node in pending if not self._name_outputs(node, names)]
            if len(waiting) == len(pending):
                name = waiting[0].name or waiting[0].op_type
                raise UnsupportedModelError(
                    f"node {name!r} uses a value that nothing makes", remedy="export the model again"
                )
            pending = waiting

    def _name_outputs(self, node: Any, names: dict[str, str]) -> bool:
        if any(name not in names for name in (*node.input, *_free_names(node))):
            return False
        attributes = sorted([attribute.name, self._attribute(attribute, names)] for attribute in node.attribute)
        kind = (node.domain or "ai.onnx", node.op_type, self._functions.get((node.domain, node.op_type), ""))
        made = _digest("node", kind, attributes, [names[name] for name in node.input], len(node.output))
        for place, name in enumerate(node.output):
            if name:
                names[name] = _digest(made, place)
        return True

    def _attribute(self, attribute: Any, names: Mapping[str, str]) -> str:
        import onnx

        kind = attribute.type
        if kind == onnx.AttributeProto.TENSOR:
            return _digest("tensor", self._weight(attribute.t))
        if kind == onnx.AttributeProto.GRAPH:
            return _digest("graph", self.read(attribute.g, names))
        if kind == onnx.AttributeProto.GRAPHS:
            return _digest("graphs", [self.read(graph, names) for graph in attribute.graphs])
        bare = onnx.AttributeProto()
        bare.CopyFrom(attribute)
        bare.ClearField("doc_string")
        return _digest("plain", _bytes(bare))

    def _weight(self, tensor: Any) -> str:
        import onnx

        head = ["weight", int(tensor.data_type), list(tensor.dims)]
        if not self._has_values:
            return _digest(head)
        return _digest(head, hashlib.sha256(onnx.numpy_helper.to_array(tensor).tobytes()).hexdigest())


def _functions(model: Any) -> dict[tuple[str, str], str]:
    found = {}
    for function in model.functions:
        bare = type(function)()
        bare.CopyFrom(function)
        bare.ClearField("doc_string")
        found[function.domain, function.name] = sha256(bare.SerializeToString(deterministic=True))
    return found


def _free_names(node: Any) -> list[str]:
    """Names that the node's inner graphs take from outside."""
    free: list[str] = []
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            bound = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            for inner in graph.node:
                free += [name for name in (*inner.input, *_free_names(inner)) if name and name not in bound]
                bound |= set(inner.output)
            free += [value.name for value in graph.output if value.name not in bound]
    return free


def _bytes(message: Any) -> str:
    return str(message.SerializeToString(deterministic=True).hex())


def fingerprint_folder(folder: Path) -> Fingerprint:
    """The fingerprint of a Hugging Face style folder: its tensors, configuration and tokenizer."""
    structure: list[list[Any]] = []
    values: list[list[Any]] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            for shape, value in _tensors(path):
                structure.append(shape)
                values.append([*shape, value])
        elif path.suffix in _CONTENT_SUFFIXES and path.name != "model.safetensors.index.json":
            structure.append(["file", path.name, _content(path)])
            values.append(structure[-1])
    return Fingerprint(_digest("folder", sorted(values, key=str)), _digest("folder", sorted(structure, key=str)))


def _tensors(path: Path) -> Iterator[tuple[list[Any], str]]:
    """(["tensor", name, type, shape], digest of the values) of each tensor in a safetensors file."""
    spans = read_safetensors(path).spans
    header = _header(path)
    with path.open("rb") as file:
        for span in spans:
            file.seek(span.offset)
            hasher, left = hashlib.sha256(), span.size_bytes
            while left:
                piece = file.read(min(left, _READ_BYTES))
                if not piece:
                    raise IntegrityError(f"{path.name} became shorter while it was read", remedy="do not change it")
                hasher.update(piece)
                left -= len(piece)
            entry = header[span.name]
            yield ["tensor", span.name, entry["dtype"], entry["shape"]], hasher.hexdigest()


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return dict(json.loads(file.read(size)))


def _content(path: Path) -> str:
    if path.suffix != ".json":
        return sha256(path.read_bytes())
    document = json.loads(path.read_bytes())
    if path.name in ("config.json", "generation_config.json") and isinstance(document, dict):
        document = {key: value for key, value in document.items() if key not in _CONFIG_NOISE}
    return sha256(canonical_bytes(document))


def _digest(*parts: Any) -> str:
    return sha256(canonical_bytes(_plain(parts)))


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, Iterable):
        return [_plain(part) for part in value]
    raise TypeError(f"{type(value).__name__} cannot be a part of a fingerprint")
