"""What this machine is, as it is reported, and whether it suits what an artefact requires."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from edge_agent.config import Profile
from model_registry.manifest import Manifest
from wire.errors import ForeshoreError
from wire.messages import Hardware

RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")
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
    for package in RUNTIME_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            runtimes[package] = version(package)
    return Hardware(
        profile=profile.name,
        targets=profile.targets,
        architecture=platform.machine(),
        cpu_features=_cpu_features(),
        memory_bytes=psutil.virtual_memory().total,
        memory_budget_bytes=profile.memory_budget_bytes,
        disk_free_bytes=psutil.disk_usage(str(folder)).free,
        accelerator=profile.accelerator,
        hardware_key=profile.hardware_key,
        runtimes=runtimes,
        max_context_tokens=profile.max_context_tokens,
    )


def check_suits(manifest: Manifest, hardware: Hardware) -> None:
    """Raise `UnsuitableError`, naming what is needed and what is here; what the machine does not tell is not held
    against it, except the hardware key: a foreign engine is never loaded.
    """
    needs = manifest.requires
    if needs.hardware_key and needs.hardware_key != hardware.hardware_key:
        _refuse("hardware key", needs.hardware_key, hardware.hardware_key or "none")
    if needs.architectures and hardware.architecture and hardware.architecture not in needs.architectures:
        _refuse("architecture", ", ".join(needs.architectures), hardware.architecture)
    missing = sorted(set(needs.cpu_features) - set(hardware.cpu_features))
    if hardware.cpu_features and missing:
        _refuse("processor features", ", ".join(needs.cpu_features), f"all but {', '.join(missing)}")
    have = hardware.runtimes.get(manifest.runtime)
    if needs.runtime_version and have and _numbers(have) < _numbers(needs.runtime_version):
        _refuse(f"{manifest.runtime} version", needs.runtime_version, have)


def _refuse(what: str, needed: str, here: str) -> None:
    raise UnsuitableError(f"the model needs {what} {needed}, here is {here}", remedy="compile it for this device")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())


def _cpu_features() -> list[str]:
    """Those of `_CPU_FEATURES` that the processor has; empty where the system does not tell."""
    try:
        lines = _CPU_FILE.read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [feature for feature in _CPU_FEATURES if feature in flags]
