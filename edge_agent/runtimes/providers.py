"""Which execution provider runs a graph, proven: a session that has it, nodes that were given to it, a run that works.

The list that ONNX Runtime advertises is only what was compiled in: it names providers whose libraries cannot load. A
session that cannot have a provider silently takes the CPU, and one that has it may give it nothing to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from wire.errors import UnsupportedModelError

CPU = "CPUExecutionProvider"
MAX_REASON_CHARS = 200


@dataclass(frozen=True)
class Tried:
    """A provider that was considered."""

    name: str
    is_accepted: bool
    reason: str


@dataclass(frozen=True)
class Opened:
    """A session and how it was chosen."""

    session: Any
    tried: tuple[Tried, ...]


def open_proven(
    path: Path,
    wanted: Sequence[str],
    options: Any,
    probe: Callable[[Any], None],
    settings: Mapping[str, Mapping[str, str]] | None = None,
) -> Opened:
    """A session on the first of `wanted`, else on the CPU, that loads the graph and survives `probe(session)`.

    `settings` are provider options by provider. Raises `UnsupportedModelError` when not even the CPU does.
    """
    tried: list[Tried] = []
    for name in [*(name for name in dict.fromkeys(wanted) if name != CPU), CPU]:
        try:
            session = _open(path, name, options, dict((settings or {}).get(name, {})))
            reason = _proof(session, name, probe)
        except Exception as error:  # noqa: BLE001 - providers raise anything; the reason is kept and told
            tried.append(Tried(name, False, _short(error)))
            continue
        return Opened(session, (*tried, Tried(name, True, reason)))
    reasons = "; ".join(f"{one.name}: {one.reason}" for one in tried)
    raise UnsupportedModelError(f"the model does not load: {reasons}", remedy="compile it for this device")


def cache_settings(folder: Path, hardware_key: str) -> dict[str, dict[str, str]]:
    """Options under which providers that compile keep their engines in `folder`, one subfolder per hardware key.

    An engine belongs to one kind of device and one driver: another key never sees it. The folder lies beside the
    artefact it was made from and is removed with it.
    """
    place = folder / (re.sub(r"[^A-Za-z0-9._-]", "_", hardware_key) or "unknown")
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {
        "TensorrtExecutionProvider": {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(place),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(place),
        },
        "NvTensorRTRTXExecutionProvider": {"nv_runtime_cache_path": str(place)},
    }


def _proof(session: Any, name: str, probe: Callable[[Any], None]) -> str:
    """Why `name` is trusted with this graph; raises where it is not.

    An example made from shapes alone may not suit the graph: on the CPU that is noted, and golden inputs judge.
    """
    if name != CPU and hasattr(session, "get_provider_graph_assignment_info"):
        parts = session.get_provider_graph_assignment_info()
        num_nodes = sum(len(part.get_nodes()) for part in parts if part.ep_name == name)
        if num_nodes == 0:
            raise LookupError("no node of the graph is given to it")
    try:
        probe(session)
    except Exception as error:
        if name != CPU:
            raise
        return f"loads; an example made from its shapes does not run: {_short(error)}"
    return "loads and runs"


def _short(error: Exception) -> str:
    return str(error).strip()[:MAX_REASON_CHARS] or type(error).__name__


def _open(path: Path, name: str, options: Any, settings: dict[str, str]) -> Any:
    if name not in onnxruntime.get_available_providers():
        raise LookupError("not part of this build of ONNX Runtime")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = [(name, settings)] if name == CPU else [(name, settings), (CPU, {})]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if session.get_providers()[0] != name:
        raise LookupError(f"the session runs on {session.get_providers()[0]} instead")
    return session
