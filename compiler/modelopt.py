"""NVIDIA's Model Optimizer, in an environment of its own: the quantiser for TensorRT, and the only one for fp8.

Its pins conflict with the compiler's, so it is never imported here. `FORESHORE_MODELOPT_PYTHON` names the interpreter
of an environment that holds it (docs/compiler.md says how to make one); without it, targets that ask for it get ONNX
Runtime's quantiser and say so.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compiler.tools import run_tool

VARIABLE = "FORESHORE_MODELOPT_PYTHON"


@dataclass(frozen=True)
class ModelOpt:
    """An environment with the Model Optimizer."""

    python: Path
    version: str

    def quantise(self, source: Path, samples: Path, out: Path, precision: str) -> None:
        """Write `source` with int8 or fp8 Q/DQ nodes to `out`; `samples` is an .npz of the graph's input."""
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            own = Path(folder, source.name)  # the tool writes beside its input, and into it
            shutil.copyfile(source, own)
            run_tool(
                "compiler.modelopt_tool:quantise",
                {"source": str(own), "samples": str(samples), "out": str(out), "precision": precision},
                python=str(self.python),
                log=Path(folder, "modelopt.log"),
            )


def find_modelopt(environment: Mapping[str, str]) -> ModelOpt | str:
    """The environment that `FORESHORE_MODELOPT_PYTHON` names, or why there is none."""
    named = environment.get(VARIABLE)
    if not named:
        return f"{VARIABLE} names no environment with nvidia-modelopt"
    python = Path(named)
    found = sorted(python.parent.parent.glob("lib/python*/site-packages/nvidia_modelopt-*.dist-info"))
    if not python.is_file() or not found:
        return f"{VARIABLE} is {named}, where nvidia-modelopt is not installed"
    return ModelOpt(python, found[-1].name.removeprefix("nvidia_modelopt-").removesuffix(".dist-info"))
