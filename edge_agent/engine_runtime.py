"""An engine that answers, with the portable graph behind it.

Whatever the engine does wrong, the request is answered: the portable artefact is loaded in its place, once and for
good, and `fallen` says why. A wrong request is the caller's fault and changes nothing.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edge_agent.config import EngineSettings
from edge_agent.runtimes.base import Array, Memory, TensorRuntime, TensorSpec
from wire.errors import ForeshoreError, InvalidInputError


class EngineRefusedError(ForeshoreError):
    """The runtime does not take the engine."""

    code = "engine_refused"


def open_engine(settings: EngineSettings, path: Path) -> TensorRuntime:
    """Have the device's module deserialise the engine at `path`. Only for engines whose proof has been checked."""
    try:
        runtime: TensorRuntime = importlib.import_module(settings.module).open_engine(path, settings.runtime)
    except ForeshoreError:
        raise
    except Exception as error:
        raise EngineRefusedError(f"the engine does not load: {error}", remedy="it is built again") from error
    return runtime


class EngineRuntime:
    """A `TensorRuntime` of an engine and, after its first failure, of the portable artefact."""

    def __init__(
        self, engine: TensorRuntime, open_portable: Callable[[], TensorRuntime], fell: Callable[[str], None]
    ) -> None:
        self._engine, self._open_portable, self._fell = engine, open_portable, fell
        self._portable: TensorRuntime | None = None
        self._lock = threading.Lock()
        self.inputs: Sequence[TensorSpec] = engine.inputs
        self.outputs: Sequence[TensorSpec] = engine.outputs
        self.name, self.providers = engine.name, engine.providers  # of whoever answers
        self.fallen: str | None = None
        self.fallback_s = 0.0  # from the failure to the portable artefact's being ready

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Answer by the engine, else by the portable artefact."""
        portable = self._portable
        if portable is not None:
            return portable.infer(inputs, outputs)
        try:
            return self._engine.infer(inputs, outputs)
        except InvalidInputError:
            raise
        except Exception as error:  # noqa: BLE001 - an engine is foreign code: any failure of it is reported by `fell`
            return self._fall(error).infer(inputs, outputs)

    def memory(self) -> Memory:
        """What whoever answers holds."""
        return (self._portable or self._engine).memory()

    def close(self) -> None:
        """Free both."""
        self._engine.close()
        if self._portable is not None:
            self._portable.close()

    def _fall(self, error: Exception) -> TensorRuntime:
        with self._lock:
            if self._portable is None:
                begun = time.monotonic()
                self._portable = self._open_portable()
                self.name, self.providers = self._portable.name, self._portable.providers
                self.fallback_s = time.monotonic() - begun
                self.fallen = f"engine_failed: {type(error).__name__}: {error}"
                self._fell(self.fallen)
            return self._portable
