"""What the agent asks of a runtime: two small Protocols, for tensors and for language. `load` is the only factory.

Neither numpy nor a runtime's package is imported before a model is loaded: an agent without a model stays small.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from edge_agent.config import Profile
from model_registry.manifest import Manifest
from wire.errors import ForeshoreError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"


class NotFiniteError(ForeshoreError):
    """The model computes NaN or infinity where the publisher saw a number."""

    code = "not_finite"


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
        """Share of `tokens` that the model would have chosen itself, each after the true ones before it.

        Logits that are no numbers raise `NotFiniteError`.
        """

    def close(self) -> None:
        """Free the memory."""


def import_runtime(manifest: Manifest) -> None:
    """Import the package that `load` needs, where this agent knows one."""
    module = _MODULE_BY_RUNTIME.get(manifest.runtime)
    if module is not None:
        importlib.import_module(module)


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


_MODULE_BY_RUNTIME: Mapping[str, str] = {
    "onnxruntime": "edge_agent.runtimes.onnxruntime_tensor",
    "onnxruntime-genai": "edge_agent.runtimes.genai_language",
}

NUMPY_BY_DATATYPE: Mapping[str, str] = {
    "BOOL": "bool",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
"""Name of the numpy type of an Open Inference Protocol datatype."""
