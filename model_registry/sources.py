"""What may be published: a path is recognised and checked before a byte of it is stored.

Accepted: an ONNX file with its external data, a folder as Hugging Face lays it out (config.json, safetensors,
tokenizer), a GGUF file, a torch.export archive. Refused with a reason: pickles in any wrapping, models that bring
their own code, truncated or incomplete files. Only structure is read; nothing is executed, and neither onnx nor torch
is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from model_registry.blobs import file_pieces
from model_registry.gguf_layout import read_gguf
from model_registry.manifest import Kind, canonical_bytes, sha256
from model_registry.onnx_layout import OnnxLayout, read_onnx
from model_registry.pt2_layout import is_pt2, read_pt2
from model_registry.safetensors_layout import read_safetensors
from wire.errors import IntegrityError, UnsupportedModelError

Format = Literal["onnx", "huggingface", "gguf", "pt2"]
KIND_BY_FORMAT: Mapping[str, Kind] = MappingProxyType(
    {"onnx": "tensor", "huggingface": "language", "gguf": "language", "pt2": "tensor"}
)
MAX_JSON_BYTES = 64 << 20
MAX_FILES = 500

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_KEPT_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: where it is inside the source, its digest (empty until hashed) and size."""

    path: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Source:
    """A checked source model. `root` is the folder that the files' paths start from."""

    format: Format
    kind: Kind
    root: Path
    files: tuple[SourceFile, ...]
    summary: str

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def digest(self) -> str:
        """The digest of a hashed source; see `source_digest`."""
        return source_digest(self.format, self.files)


def source_digest(source_format: str, files: tuple[SourceFile, ...] | list[SourceFile]) -> str:
    """The name of a source: SHA-256 over its format and its files' paths and digests, in order of path."""
    listed = sorted([file.path, file.digest, file.size_bytes] for file in files)
    return sha256(canonical_bytes({"format": source_format, "files": listed}))


def recognise(path: Path) -> Source:
    """Check `path` and say what it is; raise `UnsupportedModelError` with the reason and what to do."""
    if not path.exists():
        raise UnsupportedModelError(
            f"{path} does not exist", remedy="give an ONNX, GGUF or .pt2 file or a model folder"
        )
    if path.is_dir():
        return _recognise_folder(path)
    start = _first_bytes(path)
    if not start:
        raise UnsupportedModelError(f"{path.name} is empty", remedy="download or export it again")
    if start.startswith(b"GGUF"):
        return _recognise_gguf(path)
    if is_pt2(path):
        return _recognise_pt2(path)
    _refuse_pickle(path, start)
    if path.suffix == ".onnx":
        return _recognise_onnx(path)
    if path.suffix == ".gguf":
        return _recognise_gguf(path)  # not GGUF inside: says so
    if path.suffix == ".safetensors":
        raise UnsupportedModelError(
            f"{path.name} is weights alone", remedy="give the folder that holds it with config.json and the tokenizer"
        )
    raise UnsupportedModelError(
        f"{path.name} is of no format that can be published",
        remedy="give an ONNX, GGUF or .pt2 file, or a folder with config.json and safetensors",
    )


def hash_source(source: Source, progress: Callable[[int], None] | None = None) -> Source:
    """The same source with every file's digest; `progress` hears of the bytes read since the last call."""
    return replace(source, files=tuple(_hash_source_file(source.root, file, progress) for file in source.files))


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read a megabyte at a time."""
    hasher = hashlib.sha256()
    for piece in file_pieces(path):
        hasher.update(piece)
        if progress is not None:
            progress(len(piece))
    return hasher.hexdigest()


def _hash_source_file(root: Path, file: SourceFile, progress: Callable[[int], None] | None) -> SourceFile:
    digest = hash_file(root / file.path, progress)
    if (root / file.path).stat().st_size != file.size_bytes:
        raise IntegrityError(f"{file.path} changed while it was read", remedy="do not change it, publish again")
    return replace(file, digest=digest)


def _recognise_gguf(path: Path) -> Source:
    layout = read_gguf(path)
    if not layout.architecture:
        raise UnsupportedModelError(f"{path.name} names no architecture", remedy="convert the model again")
    if not layout.spans:
        raise UnsupportedModelError(f"{path.name} holds no tensors", remedy="a vocabulary alone cannot be published")
    if layout.values.get("split.count", 0) not in (0, 1):
        raise UnsupportedModelError(f"{path.name} is one part of several", remedy="merge them with gguf-split")
    summary = f"GGUF {layout.version}, {layout.architecture}, {len(layout.spans)} tensors"
    return Source("gguf", "language", path.parent, (_file(path, path.parent),), summary)


def _recognise_pt2(path: Path) -> Source:
    layout = read_pt2(path)
    summary = f"torch.export program, {len(layout.operators)} kinds of operators, {layout.num_weights} weights"
    return Source("pt2", KIND_BY_FORMAT["pt2"], path.parent, (_file(path, path.parent),), summary)


def _recognise_onnx(path: Path) -> Source:
    layout = read_onnx(path)
    _check_external(path, layout)
    names = [path.name, *layout.external_files]
    files = tuple(_file(path.parent / name, path.parent) for name in names)
    version = layout.opsets.get("", layout.opsets.get("ai.onnx", 0))
    summary = f"ONNX, operator set {version}, {layout.num_nodes} nodes, {len(layout.outputs)} outputs"
    return Source("onnx", "tensor", path.parent, files, summary)


def _check_external(path: Path, layout: OnnxLayout) -> None:
    for span in layout.external:
        target = path.parent / span.location
        if not target.is_file() or target.is_symlink():
            raise UnsupportedModelError(
                f"{path.name} needs {span.location!r}, which is not beside it", remedy="copy that file there as well"
            )
        end = span.offset + (span.size_bytes or 0)
        if end > target.stat().st_size:
            raise UnsupportedModelError(
                f"{span.location} is truncated: tensor {span.name!r} ends at {end} of {target.stat().st_size} bytes",
                remedy="copy or export it again",
            )


def _recognise_folder(path: Path) -> Source:
    files = sorted(_flat_files(path), key=lambda file: file.name)
    config_path = path / "config.json"
    if not config_path.is_file():
        models = [file.name for file in files if file.suffix in (".onnx", ".gguf")]
        remedy = f"give {path / models[0]} itself" if models else "give the folder that holds config.json"
        raise UnsupportedModelError(f"{path} has no config.json", remedy=remedy)
    config = _json_object(config_path)
    _refuse_own_code(path, config)
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        _refuse_missing_weights(path, files)
    tensors = {span.name for file in weights for span in read_safetensors(file).spans}
    _check_index(path, tensors)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise UnsupportedModelError(
            f"{path} has no tokenizer", remedy=f"add one of {', '.join(_TOKENIZER_FILES)} from the same model"
        )
    kept = tuple(_file(file, path) for file in files if file.suffix in _KEPT_SUFFIXES)
    summary = f"{config['model_type']}, {len(tensors)} tensors in {len(weights)} files"
    return Source("huggingface", "language", path, kept, summary)


def _refuse_own_code(path: Path, config: dict[str, Any]) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        document = config if name == "config.json" else _find_json(path / name)
        wish = next((key for key in _CODE_KEYS if document and document.get(key)), None)
        if wish is not None:
            raise UnsupportedModelError(
                f"{name} asks to run the model's own code ({wish})", remedy="code from models is never run here"
            )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModelError("config.json names no model_type", remedy="save the model with transformers again")


def _refuse_missing_weights(path: Path, files: list[Path]) -> None:
    pickles = [file.name for file in files if file.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise UnsupportedModelError(
            f"{path} holds its weights as a pickle ({pickles[0]})",
            remedy="save it as safetensors: model.save_pretrained(folder, safe_serialization=True)",
        )
    raise UnsupportedModelError(f"{path} holds no safetensors", remedy="download the weights as well")


def _check_index(path: Path, tensors: set[str]) -> None:
    index = _find_json(path / "model.safetensors.index.json")
    if index is None:
        return
    named = index.get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UnsupportedModelError("model.safetensors.index.json names no files", remedy="download it again")
    absent = sorted({str(name) for name in named.values() if not (path / str(name)).is_file()})
    if absent:
        raise UnsupportedModelError(f"{absent[0]} is missing in {path}", remedy="download all parts of the weights")
    lost = sorted(set(named) - tensors)
    if lost:
        raise UnsupportedModelError(f"tensor {lost[0]!r} is in no file of {path}", remedy="download all parts again")


def _flat_files(path: Path) -> Iterator[Path]:
    for count, entry in enumerate(path.iterdir()):
        if count >= MAX_FILES:
            raise UnsupportedModelError(
                f"{path} holds more than {MAX_FILES} files", remedy="give the model's own folder"
            )
        if entry.is_file() and not entry.name.startswith("."):
            yield entry


def _file(path: Path, root: Path) -> SourceFile:
    return SourceFile(path.relative_to(root).as_posix(), "", path.stat().st_size)


def _json_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsupportedModelError(f"{path.name} has {path.stat().st_size} bytes", remedy=f"at most {MAX_JSON_BYTES}")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path.name} is not JSON", remedy="download it again") from error
    if not isinstance(document, dict):
        raise UnsupportedModelError(f"{path.name} is not a JSON object", remedy="download it again")
    return document


def _find_json(path: Path) -> dict[str, Any] | None:
    return _json_object(path) if path.is_file() else None


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error.strerror}", remedy="check it") from error


def _refuse_pickle(path: Path, start: bytes) -> None:
    is_zip = start.startswith(b"PK\x03\x04")
    is_pickle = start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05" and len(start) > 1
    if path.suffix in _PICKLE_SUFFIXES or is_pickle or (is_zip and path.suffix != ".npz"):
        raise UnsupportedModelError(
            f"{path.name} is a pickle or an archive, and opening one can run code",
            remedy="export the model as ONNX, or save it as safetensors",
        )
