"""Embeddings: the last hidden states of a prompt, after the final norm, pooled into one vector of length 1.

Rules, in order:
1. The sum of a mean grows chunk by chunk, in float32, where the hidden states are; a chunk that starts at token 0
   begins anew (first chunk, or the prompt is computed again after a preemption).
2. Nothing here looks at a value on the device, so nothing waits.
3. The model folder says how its embeddings are pooled (sentence-transformers' `modules.json` and the pooling module's
   `config.json`); a folder that says nothing gets the mean, as on a device: both places give one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cloud.serving.backend import Tensor
from cloud.serving.request import Pooling, Request, State
from cloud.serving.scheduler import Chunk
from cloud.serving.weights import read_json
from wire.errors import UnsupportedModelError

DEFAULT_POOLING = Pooling.MEAN
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_MODES = {
    "mean": Pooling.MEAN,
    "mean_sqrt_len_tokens": Pooling.MEAN,  # the same direction, and only the direction is kept
    "lasttoken": Pooling.LAST,
}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, eq=False)
class Pooled:
    """Vectors of the inputs that a step completed: [len(positions), hidden] float32; positions among the chunks."""

    positions: list[int]
    vectors: Tensor


class Pooler:
    """Keeps the sums of inputs whose chunks are spread over steps."""

    def __init__(self) -> None:
        self._sums: dict[Request, Tensor] = {}

    @property
    def num_open(self) -> int:
        """Inputs whose sum is kept for a later step."""
        return len(self._sums)

    def pool(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor]) -> Pooled | None:
        """Take in a step: per chunk the hidden states [n, hidden] of its `output_rows`. None: no input is complete.

        Chunks of requests that generate are passed over; what is given for them is not read.
        """
        self._forget_ended()
        positions: list[int] = []
        rows: list[Tensor] = []
        for position, (chunk, states) in enumerate(zip(chunks, hidden, strict=True)):
            if chunk.request.pooling is None or not len(chunk.output_rows):
                continue
            row = self._add(chunk, states) if chunk.request.pooling is Pooling.MEAN else states[-1].float()
            if chunk.is_last_of_input:
                self._sums.pop(chunk.request, None)
                positions.append(position)
                rows.append(row)
        return Pooled(positions, F.normalize(torch.stack(rows), dim=-1)) if rows else None

    def _add(self, chunk: Chunk, states: Tensor) -> Tensor:
        total = states.sum(dim=0, dtype=torch.float32)
        if chunk.start:
            total += self._sums[chunk.request]
        self._sums[chunk.request] = total
        return total

    def _forget_ended(self) -> None:
        """Drop the sums of requests that were cancelled between two of their chunks."""
        for request in [request for request in self._sums if request.state is State.FINISHED]:
            del self._sums[request]


def read_pooling(folder: Path) -> Pooling:
    """How this model's embeddings are pooled; raises `UnsupportedModelError` for a way that is not known here."""
    path = folder / _pooling_folder(folder) / "config.json"
    if not path.is_file():
        return DEFAULT_POOLING
    modes = _read_modes(path)
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    raise UnsupportedModelError(
        f"{path} pools by {' and '.join(modes) or 'nothing'}", remedy=f"one of {', '.join(_MODES)} is supported"
    )


def _pooling_folder(folder: Path) -> str:
    """The pooling module's folder by `modules.json`; without that file, the usual one."""
    path = folder / "modules.json"
    if not path.is_file():
        return "1_Pooling"
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UnsupportedModelError(f"{path} does not hold a list of modules", remedy="check the file")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    strangers = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if strangers:
        raise UnsupportedModelError(
            f"{path} names the modules {', '.join(strangers)}", remedy=f"only {', '.join(_KNOWN_MODULES)} are supported"
        )
    name = next((str(m.get("path", "")) for m, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), "")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnsupportedModelError(f"{path} points outside its folder: {name!r}", remedy="check the file")
    return name or "1_Pooling"


def _read_modes(path: Path) -> list[str]:
    """The modes a pooling module's configuration switches on: newer files name one, older ones have a flag for each."""
    data: Any = read_json(path)
    if not isinstance(data, dict):
        raise UnsupportedModelError(f"{path} does not hold an object", remedy="check the file")
    named = data.get("pooling_mode")
    if named is not None:
        return [str(one).lower() for one in (named if isinstance(named, list) else [named])]
    return [mode for flag, mode in _FLAGS.items() if data.get(flag)]
