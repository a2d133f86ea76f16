"""What this machine is, as it is reported, and whether it suits what an artefact requires."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from edge_agent.accelerator import find_accelerator
from edge_agent.config import Profile
from model_registry.compatibility import facts_of, resolve
from model_registry.manifest import Manifest
from wire.errors import ForeshoreError
from wire.messages import Hardware

RUNTIME_PACKAGES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime-gpu",
    "onnxruntime-genai": "onnxruntime-genai",
    "onnxruntime-genai-cuda": "onnxruntime-genai-cuda",
    "tensorrt": "tensorrt",
    "tensorrt-rtx-cu13-bindings": "tensorrt-rtx",
}
"""Package -> the runtime that it brings, as it is reported."""
_CPU_FILE = Path("/proc/cpuinfo")
_CPU_FEATURES = (
    *("sse4_2", "avx", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("fma", "f16c", "asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)


class UnsuitableError(ForeshoreError):
    """The artefact was made for other hardware than this."""

    code = "unsuitable_hardware"


def find_hardware(profile: Profile, folder: Path) -> Hardware:
    """This machine within its profile; `folder` is where models will lie."""
    runtimes = {}
    for package, name in RUNTIME_PACKAGES.items():
        with contextlib.suppress(PackageNotFoundError):
            runtimes[name] = version(package)
    found = find_accelerator()
    engine = profile.engine
    return Hardware(
        profile=profile.name,
        targets=profile.targets,
        architecture=(engine and engine.architecture) or platform.machine(),
        cpu_features=[] if engine and engine.architecture else _cpu_features(),
        memory_bytes=psutil.virtual_memory().total,
        memory_budget_bytes=profile.memory_budget_bytes,
        disk_free_bytes=psutil.disk_usage(str(folder)).free,
        accelerator=profile.accelerator,
        hardware_key=profile.hardware_key,
        runtimes=runtimes | (engine.runtimes() if engine else {}),
        max_context_tokens=profile.max_context_tokens,
        providers=found.providers or None,
        compute_capability=(engine and engine.compute_capability) or found.compute_capability,
        jetpack=(engine and engine.jetpack) or found.jetpack,
        driver=found.driver,
    )


def check_suits(manifest: Manifest, hardware: Hardware) -> None:
    """Raise `UnsuitableError` with the rule's sentence when a rule speaks against it; memory and disk are judged by
    what is free at that moment, elsewhere.
    """
    verdict = resolve(replace(facts_of(manifest), memory_bytes=0, disk_bytes=0), hardware)
    if not verdict.will_run:
        raise UnsuitableError(f"the model {verdict.sentence}", remedy="compile it for this device", rule=verdict.rule)


def _cpu_features() -> list[str]:
    """Those of `_CPU_FEATURES` that the processor has; empty where the system does not tell."""
    try:
        lines = _CPU_FILE.read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [feature for feature in _CPU_FEATURES if feature in flags]
