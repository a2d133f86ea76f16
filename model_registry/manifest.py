"""What an artefact and a release are: two documents with canonical bytes, named by their SHA-256.

A `Manifest` describes one artefact (one model, one target): its files as sequences of chunks, how it runs, what it
needs, golden inputs and what the gates measured. A `Release` names one version of a model and the manifests of its
artefacts by target; the publisher's signed metadata lists the release's digest (see `trust.roles`), and through the
digests everything below it. Both are parsed strictly and within size limits. This file never touches disk or network.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from wire.errors import IntegrityError, InvalidInputError, TooLargeError, UnknownVersionError
from wire.frames import MAX_CHUNK_BYTES
from wire.messages import Digest, Name

MANIFEST_SCHEMA = "foreshore.manifest/1"
RELEASE_SCHEMA = "foreshore.release/1"
MAX_MANIFEST_BYTES = 16 << 20
ENGINE_SCHEMA = "foreshore.engine/1"
MAX_RELEASE_BYTES = 256 << 10
MAX_ENGINE_DOCUMENT_BYTES = 8 << 10
MAX_ENGINE_BYTES = 32 << 30

Size = Annotated[int, Field(ge=0, le=1 << 44)]
Runtime = Literal["onnxruntime", "onnxruntime-genai", "tensorrt-rtx", "tensorrt", "safetensors"]
ChosenRuntime = Literal["onnxruntime", "onnxruntime-genai", "tensorrt-rtx", "tensorrt"]
ArtefactReproducibility = Literal["byte-identical", "output-equivalent"]
"""What a rebuild from source, recipe and tools gives: the same bytes, or others that compute the same."""

Kind = Literal["tensor", "language"]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Chunk(_Document):
    """A run of bytes of one file, named by the digest of its uncompressed bytes.

    `element_bytes` is the width of the numbers inside (1, 2 or 4) where it is known; it chooses the byte planes.
    """

    digest: Digest
    size_bytes: Annotated[int, Field(ge=1, le=MAX_CHUNK_BYTES)]
    element_bytes: Literal[1, 2, 4] = 1


class ArtefactFile(_Document):
    """One file: a relative path inside the artefact's folder and its chunks in order."""

    path: Annotated[str, Field(min_length=1, max_length=200)]
    size_bytes: Size
    digest: Digest
    chunks: list[Chunk] = Field(max_length=1_000_000)

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        plain = PurePosixPath(path)
        if plain.is_absolute() or ".." in plain.parts or plain.as_posix() != path or path == ".":
            raise ValueError(f"path {path!r} leaves the artefact's folder or has more than one spelling")
        if "\\" in path or not path.isprintable():
            raise ValueError(f"path {path!r} holds a backslash or a control character")
        return path

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if sum(chunk.size_bytes for chunk in self.chunks) != self.size_bytes:
            raise ValueError(f"chunks of {self.path!r} do not add up to {self.size_bytes} bytes")
        return self


class DeltaEncoding(_Document):
    """A cheaper way to send this artefact to a device that holds another one.

    The frames are stored under `index`, a blob that lists one frame digest per chunk (JSON list of digests).
    """

    name: Name
    base_manifest: Digest
    index: Digest
    wire_bytes: Size


class GateResult(_Document):
    """One measured gate: what, how much, the limit and whether it holds."""

    name: str
    value: float
    limit: float
    sense: Literal["<=", ">="]
    passed: bool


class Golden(_Document):
    """Golden inputs and outputs for the probe on the device, a file of the artefact.

    Tensor models: an .npz with `input.<name>` and `output.<name>`, first axis = cases; `max_abs_error` and
    `min_cosine` bound each case, `min_top1_agreement` the set. Language models: a JSON file
    `{"cases": [{"prompt_tokens": [...], "tokens": [...]}]}`, greedy; `min_token_agreement` is the share of positions
    that agree under teacher forcing or, where the runtime cannot force, of the first differing position.
    """

    path: str
    num_cases: Annotated[int, Field(ge=1, le=10_000)]
    max_abs_error: float | None = None
    min_cosine: float | None = None
    min_top1_agreement: float | None = None
    min_token_agreement: float | None = None


class Vision(_Document):
    """How an image becomes the input of a classifier, and what its outputs are called."""

    resize_pixels: Annotated[int, Field(ge=1, le=4096)]
    crop_pixels: Annotated[int, Field(ge=1, le=4096)]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    labels: list[str] = Field(default_factory=list, max_length=100_000)


class Requirements(_Document):
    """What a device must have; the resolver and the agent's preflight check it before a byte is fetched."""

    memory_bytes: Size = 0
    disk_bytes: Size = 0
    architectures: list[str] = Field(default_factory=list, max_length=8)
    cpu_features: list[str] = Field(default_factory=list, max_length=16)
    hardware_key: str | None = None
    runtime_version: str | None = None  # lowest version that loads it
    providers: Annotated[list[str], Field(max_length=8)] | None = None  # one of these execution providers must be there


NumberFormat = Literal["fp16", "bf16", "int8", "int4", "fp8", "fp4", "int32_bias"]


class Graph(_Document):
    """What a runtime must understand, so that nobody has to open the graph to know whether it will load.

    `operators` are those outside ONNX's own domains, with the uses in brackets that only some providers implement
    (`com.microsoft.GroupQueryAttention[qk_norm]`); `formats` are the formats of its numbers besides fp32 and integers
    that count, `int32_bias` for biases that are dequantised from 32 bits.
    """

    ir_version: Annotated[int, Field(ge=1, le=1000)]
    opsets: dict[str, Annotated[int, Field(ge=1, le=1000)]] = Field(max_length=32)
    operators: list[Annotated[str, Field(max_length=200)]] = Field(default_factory=list, max_length=256)
    formats: list[NumberFormat] = Field(default_factory=list, max_length=16)


class Engine(_Document):
    """A device-specific engine beside the portable graph. It loads only where version and capability agree."""

    path: str
    builder: Literal["tensorrt-rtx", "tensorrt"]
    builder_version: Annotated[str, Field(max_length=64)]
    compute_capabilities: list[Annotated[str, Field(max_length=8)]] = Field(min_length=1, max_length=8)


class RuntimeOption(_Document):
    """A runtime that could run the artefact, what was measured of it, and why it was or was not chosen."""

    runtime: ChosenRuntime
    reason: Annotated[str, Field(min_length=1, max_length=300)]
    figures: Annotated[dict[str, float], Field(max_length=16)] = {}


class RuntimeChoice(_Document):
    """Which runtime runs the artefact on its target and why; `basis` says what decided: figures, a rule, the recipe.

    For language models "onnxruntime" is the agent's own decoding loop; both read the folder that `runtime` names. For
    tensor models an engine's builder means: that engine where it is there and loads, ONNX Runtime until then.
    """

    basis: Literal["measured", "rule", "recipe"]
    chosen: RuntimeOption
    rejected: Annotated[list[RuntimeOption], Field(max_length=8)] = []


class Manifest(_Document):
    """One artefact."""

    schema_: Literal["foreshore.manifest/1"] = Field(default="foreshore.manifest/1", alias="schema")
    name: Name
    kind: Kind
    target: Name
    runtime: Runtime
    runtime_choice: RuntimeChoice | None = None
    precision: Annotated[str, Field(max_length=64)]
    files: list[ArtefactFile] = Field(min_length=1, max_length=1000)
    entry: str  # the file (or ".") that the runtime opens
    requires: Requirements = Requirements()
    context_tokens: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    graph: Graph | None = None
    engine: Engine | None = None
    golden: Golden | None = None
    vision: Vision | None = None
    gates: list[GateResult] = Field(default_factory=list, max_length=64)
    recipe_digest: Digest | None = None
    source_digest: Digest
    tools: dict[str, str] = Field(default_factory=dict)
    reproducibility: ArtefactReproducibility | None = None
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="after")
    def _names_its_own_files(self) -> Self:
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("two files have the same path")
        if self.entry != "." and self.entry not in paths:
            raise ValueError(f"entry {self.entry!r} is none of the files")
        if self.golden is not None and self.golden.path not in paths:
            raise ValueError(f"golden file {self.golden.path!r} is none of the files")
        if self.engine is not None and self.engine.path not in paths:
            raise ValueError(f"engine file {self.engine.path!r} is none of the files")
        return self

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, uncompressed."""
        return sum(file.size_bytes for file in self.files)

    def chunk_list(self) -> list[Chunk]:
        """All chunks in order; a chunk's place here is its index in frames and need messages."""
        return [chunk for file in self.files for chunk in file.chunks]

    def to_bytes(self) -> bytes:
        """The canonical bytes; their SHA-256 is the manifest's name."""
        return canonical_bytes(self.model_dump(mode="json", by_alias=True, exclude_none=True))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hex."""
        return sha256(self.to_bytes())


class ReleaseArtefact(_Document):
    """An artefact as a release names it; deltas are part of what the publisher signs."""

    target: Name
    manifest: Digest
    manifest_bytes: Size
    size_bytes: Size
    runtime: Runtime
    precision: str
    deltas: list[DeltaEncoding] = Field(default_factory=list, max_length=8)


class _Listed(_Document):
    """A document that stands in a publisher's list by its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    def to_bytes(self) -> bytes:
        """The canonical bytes: what the digest, which is what publishers sign, is taken of."""
        return canonical_bytes(self.model_dump(mode="json", by_alias=True, exclude_none=True))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hex."""
        return sha256(self.to_bytes())


class Release(_Listed):
    """One version of a model for all its targets: the document whose digest the publisher signs."""

    schema_: Literal["foreshore.release/1"] = Field(default="foreshore.release/1", alias="schema")
    tenant: Name
    name: Name
    version: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]*$")]
    sequence: Annotated[int, Field(ge=1, le=2**53)]  # rises with every release of this name
    kind: Kind
    licence: Annotated[str, Field(max_length=200)] = ""
    source_format: Annotated[str, Field(max_length=32)]
    source_digest: Digest
    created_at: Annotated[str, Field(max_length=40)]
    artefacts: list[ReleaseArtefact] = Field(min_length=1, max_length=64)

    @property
    def listing(self) -> dict[str, Any]:
        """What a publisher's list says of it to people."""
        return {"version": self.version, "sequence": self.sequence}


class EngineBuild(_Listed):
    """An engine that was built from an artefact for one hardware key: the document whose digest the publisher signs.

    It stands in a publisher's list like a release, under the same model, and names the engine's bytes by digest.
    """

    schema_: Literal["foreshore.engine/1"] = Field(default="foreshore.engine/1", alias="schema")
    tenant: Name
    name: Name
    manifest: Digest  # of the artefact whose graph it was built from
    hardware_key: Annotated[str, Field(min_length=1, max_length=120)]
    builder: Literal["tensorrt-rtx", "tensorrt"]
    builder_version: Annotated[str, Field(max_length=64)]
    engine: Digest  # of its bytes
    size_bytes: Annotated[int, Field(ge=1, le=MAX_ENGINE_BYTES)]
    built_by: Annotated[str, Field(max_length=200)]
    built_at: Annotated[str, Field(max_length=40)]

    @property
    def listing(self) -> dict[str, Any]:
        """What a publisher's list says of it to people."""
        return {"engine_for": self.hardware_key, "manifest": self.manifest}


D = TypeVar("D", Manifest, Release, EngineBuild)


def canonical_bytes(document: Any) -> bytes:
    """JSON with sorted keys, no white space and UTF-8: the same document always gives the same bytes."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, *, expected_digest: str | None = None) -> Manifest:
    """Read a manifest; with `expected_digest` the bytes must hash to it before they are parsed, and be canonical."""
    return _parse(Manifest, data, MANIFEST_SCHEMA, MAX_MANIFEST_BYTES, expected_digest)


def parse_release(data: bytes, *, expected_digest: str | None = None) -> Release:
    """Read a release; with `expected_digest` the bytes must hash to it before they are parsed, and be canonical."""
    return _parse(Release, data, RELEASE_SCHEMA, MAX_RELEASE_BYTES, expected_digest)


def parse_engine_build(data: bytes, *, expected_digest: str | None = None) -> EngineBuild:
    """Read an engine's document; with `expected_digest` the bytes must hash to it before they are parsed."""
    return _parse(EngineBuild, data, ENGINE_SCHEMA, MAX_ENGINE_DOCUMENT_BYTES, expected_digest)


def _parse(kind: type[D], data: bytes, schema: str, max_bytes: int, expected_digest: str | None) -> D:
    what = kind.__name__.lower()
    if len(data) > max_bytes:
        raise TooLargeError(f"{what} has {len(data)} bytes", remedy=f"at most {max_bytes} are accepted")
    if expected_digest is not None and sha256(data) != expected_digest:
        raise IntegrityError(f"{what} does not hash to {expected_digest[:12]}", remedy="fetch it again")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{what} is not JSON", remedy="fetch it again") from error
    if not isinstance(document, dict) or document.get("schema") != schema:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise UnknownVersionError(f"{what} has schema {found!r}", remedy=f"this build reads {schema!r}")
    try:
        parsed = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or what
        raise InvalidInputError(f"{what}: {where}: {first['msg']}", remedy="publish it again") from error
    if expected_digest is not None and parsed.digest != expected_digest:
        raise IntegrityError(f"{what} {expected_digest[:12]} is not in canonical form", remedy="publish it again")
    return parsed
