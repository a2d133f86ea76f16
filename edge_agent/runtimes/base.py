"""What the agent asks of a runtime: two small Protocols, for tensors and for language. `load` is the only factory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_agent.config import Profile
from model_registry.manifest import Manifest
from wire.errors import UnsupportedModelError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type (Open Inference Protocol's words) and shape; -1 is any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One token and the text it adds."""

    token: int
    text: str
    finish_reason: str | None = None


class TensorRuntime(Protocol):
    """A loaded tensor model; `infer` may be called from several threads."""

    name: str
    providers: list[str]
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Outputs by name (all of them by default); wrong inputs raise `InvalidInputError`."""

    def close(self) -> None:
        """Free the memory."""


class LanguageRuntime(Protocol):
    """A loaded language model."""

    name: str
    providers: list[str]
    context_tokens: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's own template, ready for the answer."""

    def generate(self, prompt: Sequence[int], sampling: Sampling, cancel: threading.Event) -> Iterator[Piece]:
        """Pieces as they come; the last one has a finish reason. Blocking: call it in a thread."""

    def agreement(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """Share of `tokens` that the model would have chosen itself, each after the true ones before it."""

    def close(self) -> None:
        """Free the memory."""


def load(manifest: Manifest, files: Path, profile: Profile) -> TensorRuntime | LanguageRuntime:
    """Load an artefact with the runtime its manifest names. Blocking; the runtime's package is imported here."""
    if manifest.runtime == "onnxruntime":
        from edge_agent.runtimes.onnxruntime_tensor import OnnxRuntimeTensor

        return OnnxRuntimeTensor(files / manifest.entry, profile.providers, profile.num_threads)
    if manifest.runtime == "onnxruntime-genai":
        from edge_agent.runtimes.genai_language import GenaiLanguage

        limit = min(manifest.context_tokens or profile.max_context_tokens, profile.max_context_tokens)
        return GenaiLanguage(files if manifest.entry == "." else (files / manifest.entry).parent, limit)
    raise UnsupportedModelError(
        f"this agent has no runtime {manifest.runtime!r}", remedy="compile for a target with onnxruntime"
    )


def as_numpy(datatype: str) -> Any:
    """numpy type of an Open Inference Protocol datatype; `KeyError` when unknown."""
    return NUMPY_BY_DATATYPE[datatype]


NUMPY_BY_DATATYPE: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
