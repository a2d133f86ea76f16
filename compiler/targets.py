"""Targets: classes of devices and the numeric scheme that suits each.

One quantised graph does not serve all: x86 wants unsigned activations so that every convolution becomes an integer
kernel, TensorRT wants symmetric signed ones and no quantised bias. A target is a YAML file in `fleet_configs/targets`
and travels inside a compile job; it is parsed strictly here. This file decides nothing about a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wire.errors import InvalidInputError, NotFoundError
from wire.messages import Name

TARGETS_FOLDER = Path(__file__).resolve().parent.parent / "fleet_configs" / "targets"
TensorPrecision = Literal["fp32", "fp16", "int8", "fp8"]
LanguagePrecision = Literal["fp32", "fp16", "int8", "int4"]
ALL = "all"
FIRST_FP8_CAPABILITY = 8.9


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorScheme(_Strict):
    """How tensor models are made smaller. 8 bits are explicit Q/DQ nodes, weights signed and per channel.

    `quantiser` is who writes them: ONNX Runtime's own or NVIDIA's Model Optimizer, where an environment with it exists
    (else ONNX Runtime's, and the artefact says so). fp8 exists only in the latter.
    """

    precision: TensorPrecision = "fp32"
    activations: Literal["uint8", "int8"] = "uint8"
    reduce_range: bool = False  # 7-bit weights: for CPUs whose integer instructions saturate
    quantise_bias: bool = True
    quantiser: Literal["onnxruntime", "modelopt"] = "onnxruntime"


class LanguageScheme(_Strict):
    """How language models are made smaller, and ONNX Runtime's execution provider that the graph is written for."""

    precision: LanguagePrecision = "fp32"
    provider: Literal["cpu", "cuda"] = "cpu"


class EngineTarget(_Strict):
    """The TensorRT engine of this class of devices: who builds it and for which compute capabilities ("8.6")."""

    builder: Literal["tensorrt-rtx", "tensorrt"]
    compute_capabilities: Annotated[
        list[Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]], Field(min_length=1, max_length=8)
    ]
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 8


class Budget(_Strict):
    """What the devices of a class have to give to one model; None is no limit."""

    latency_ms: Annotated[float, Field(gt=0)] | None = None
    memory_bytes: Annotated[int, Field(gt=0)] | None = None


class Target(_Strict):
    """One class of devices.

    `cpu_features` are demanded of a device. `tensor_kernels` says on whose arithmetic 8-bit tensor graphs run there:
    gates use this machine's integer kernels only if it has the same, and else the graph's own definition in floats.
    """

    name: Name
    description: Annotated[str, Field(max_length=300)] = ""
    architectures: list[str] = Field(default_factory=list, max_length=8)
    cpu_features: list[str] = Field(default_factory=list, max_length=16)
    tensor_kernels: Literal["x86-avx2", "x86-vnni", "arm", "gpu"] = "x86-avx2"
    tensor: TensorScheme = TensorScheme()
    language: LanguageScheme = LanguageScheme()
    engine: EngineTarget | None = None
    budget: Budget = Budget()


def parse_target(document: Any) -> Target:
    """Read a target from plain data (a job's `target`, a YAML file)."""
    try:
        return Target.model_validate(document)
    except ValidationError as error:
        raise InvalidInputError(f"target: {_first(error)}", remedy="see fleet_configs/targets") from error


def target_names(folder: Path = TARGETS_FOLDER) -> list[str]:
    """Names of all targets, in order."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_targets(names: str, folder: Path = TARGETS_FOLDER) -> list[Target]:
    """The targets of a comma-separated list, or every one for "all"; each once."""
    wanted = target_names(folder) if names.strip() == ALL else [name.strip() for name in names.split(",")]
    found = [load_target(name, folder) for name in dict.fromkeys(wanted) if name]
    if not found:
        raise InvalidInputError("no target is named", remedy=f"name some, or {ALL!r}")
    return found


def load_target(name: str, folder: Path = TARGETS_FOLDER) -> Target:
    """The target in `folder/NAME.yaml`."""
    known = target_names(folder)
    if name not in known:
        raise NotFoundError(f"there is no target {name!r}", remedy=f"known are: {', '.join(known)}")
    target = parse_target(yaml.safe_load((folder / f"{name}.yaml").read_text()))
    if target.name != name:
        raise InvalidInputError(f"{name}.yaml names its target {target.name!r}", remedy="file and name must agree")
    return target


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg']}"
