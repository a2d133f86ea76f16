"""What the agent asks of a runtime: two small Protocols, for tensors and for language. `load` is the only factory.

Neither numpy nor a runtime's package is imported before a model is loaded: an agent without a model stays small.
"""

from __future__ import annotations

import importlib
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from edge_agent.config import Profile
from model_registry.manifest import Manifest
from wire.errors import ForeshoreError, InvalidInputError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"
STEP_TIMEOUT_S = 600.0
"""Longest wait for one token; a stream that says nothing for so long is given up."""


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
    top_k: int = 0  # 0: all
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: str | None = None  # JSON text; the answer will match it


@dataclass(frozen=True)
class Piece:
    """One token and the text it adds; the last one of a stream has a finish reason (stop, length, cancelled)."""

    token: int  # -1: none, the stream was cancelled
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True)
class Memory:
    """What a loaded model holds."""

    weights_bytes: int  # size of its files
    cache_bytes: int = 0  # keys and values of the streams that run, or reused buffers
    num_streams: int = 0


@dataclass(frozen=True)
class LanguageLimits:
    """What a device grants a language model."""

    context_tokens: int
    num_streams: int = 1
    num_threads: int = 1
    providers: tuple[str, ...] = ()


Deliver: TypeAlias = Callable[[Piece | Exception], None]
"""Takes the pieces of one stream, from any thread; an exception, like a finish reason, is the last thing it gets."""

Cancel: TypeAlias = Callable[[], None]


class TensorRuntime(Protocol):
    """A loaded tensor model; `infer` may be called from several threads."""

    name: str
    providers: list[str]
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Outputs by name (all of them by default); wrong inputs raise `InvalidInputError`."""

    def memory(self) -> Memory:
        """What it holds."""

    def close(self) -> None:
        """Free the memory."""


class LanguageRuntime(Protocol):
    """A loaded language model."""

    name: str
    providers: list[str]
    max_context_tokens: int  # of the model, as the device's profile allows it
    cache_token_bytes: int  # keys and values of one token; 0: not known

    @property
    def context_tokens(self) -> int:
        """Of one stream: `max_context_tokens`, or fewer where `limit_cache` says so."""

    def limit_cache(self, num_bytes: int) -> None:
        """Let keys and values of all streams take no more than this: a stream waits until it fits beside those that
        run, which keep what they have. Nothing where `cache_token_bytes` is 0.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's own template, ready for the answer."""

    def start(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver) -> Cancel:
        """Begin a stream and return at once; raises `InvalidInputError` for what can never run.

        Streams that run at the same time share the model. The returned function ends this one within a step.
        """

    def embed(self, tokens: Sequence[int]) -> Array:
        """A vector [hidden size] of length 1 for a text: the mean of the last hidden states. Blocking.

        Raises `UnsupportedModelError` where the graph gives no hidden states.
        """

    def agreement(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """Share of `tokens` that the model would have chosen itself, each after the true ones before it.

        Logits that are no numbers raise `NotFiniteError`.
        """

    def memory(self) -> Memory:
        """What it holds."""

    def close(self) -> None:
        """Free the memory."""


def import_runtime(manifest: Manifest) -> None:
    """Import the package that `load` needs, where this agent knows one."""
    module = _MODULE_BY_RUNTIME.get(manifest.runtime)
    if module is not None:
        importlib.import_module(module)


def load(manifest: Manifest, files: Path, profile: Profile) -> TensorRuntime | LanguageRuntime:
    """Load an artefact with the runtime its manifest names. Blocking; the runtime's package is imported here."""
    if manifest.runtime not in _MODULE_BY_RUNTIME:
        raise UnsupportedModelError(
            f"this agent has no runtime {manifest.runtime!r}", remedy="compile for a target with onnxruntime"
        )
    if manifest.kind == "language":
        from edge_agent.runtimes.language import load_language

        folder = files if manifest.entry == "." else (files / manifest.entry).parent
        choice = manifest.runtime_choice.chosen.runtime if manifest.runtime_choice else None
        return load_language(folder, _limits(manifest, profile), choice)
    from edge_agent.runtimes.onnxruntime_tensor import OnnxRuntimeTensor

    return OnnxRuntimeTensor(
        files / manifest.entry, profile.providers, profile.num_threads, hardware_key=_engine_key(profile, files)
    )


def generate(runtime: LanguageRuntime, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
    """The pieces of one stream as they come. Blocking; leaving early cancels it."""
    arrived: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
    cancel = runtime.start(prompt, sampling, arrived.put)
    try:
        while True:
            piece = arrived.get(timeout=STEP_TIMEOUT_S)
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason is not None:
                return
    finally:
        cancel()


def check_length(prompt: Sequence[int], max_tokens: int, context_tokens: int) -> None:
    """Raise `InvalidInputError` for a prompt that is empty or too long."""
    if not prompt:
        raise InvalidInputError("the prompt is empty", remedy="send some text")
    if len(prompt) + max_tokens > context_tokens:
        raise InvalidInputError(
            f"{len(prompt)} prompt and {max_tokens} new tokens exceed {context_tokens}",
            remedy="send a shorter prompt or a lower max_tokens",
        )


def _engine_key(profile: Profile, folder: Path) -> str | None:
    """What engines that ONNX Runtime builds here are good for, in the words of those that the fleet shares."""
    from edge_agent.hardware import find_hardware
    from model_registry.compatibility import key_of

    key = key_of(find_hardware(profile, folder)) if profile.providers else None
    return str(key) if key is not None else profile.hardware_key


def _limits(manifest: Manifest, profile: Profile) -> LanguageLimits:
    context = min(manifest.context_tokens or profile.max_context_tokens, profile.max_context_tokens)
    return LanguageLimits(context, profile.max_streams, profile.num_threads, tuple(profile.providers))


_MODULE_BY_RUNTIME: Mapping[str, str] = {
    "onnxruntime": "edge_agent.runtimes.onnxruntime_tensor",
    "onnxruntime-genai": "edge_agent.runtimes.language",
}

NUMPY_BY_DATATYPE: Mapping[str, str] = {
    "BOOL": "bool",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
"""Name of the numpy type of an Open Inference Protocol datatype."""
