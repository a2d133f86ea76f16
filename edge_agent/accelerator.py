"""What can be read about accelerators without opening one: the driver, the JetPack, the execution providers.

A provider counts when its library lies in the installed ONNX Runtime and its hardware is here; that it really works is
shown by a session alone. Files only, below an injectable root: this is asked with every report.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

_JETPACK_BY_L4T = {
    (35, 2): "5.1", (35, 3): "5.1", (35, 4): "5.1", (35, 5): "5.1", (35, 6): "5.1",
    (36, 2): "6.0", (36, 3): "6.0", (36, 4): "6.1", (38, 2): "7.0",
}  # fmt: skip
_JETPACK_62_REVISION = 4.3  # of R36: R36.4.3 is JetPack 6.2
_CAPABILITY_BY_BOARD = {"orin": "8.7", "thor": "11.0", "xavier": "7.2"}
_LIBRARY_BY_PROVIDER = {
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
}
_DEVICES = ("dev/nvidia0", "dev/nvhost-gpu", "dev/nvgpu")


@dataclass(frozen=True)
class Accelerator:
    """None: not told by this machine."""

    compute_capability: str | None = None
    jetpack: str | None = None
    driver: str | None = None
    providers: list[str] = field(default_factory=list)


def find_accelerator(root: Path = Path("/"), packages: Path | None = None) -> Accelerator:
    """What the files below `root` tell; `packages` is where ONNX Runtime lies (found by itself)."""
    board = _text(root / "proc/device-tree/model").lower()
    has_gpu = any((root / device).exists() for device in _DEVICES)
    return Accelerator(
        compute_capability=next((one for name, one in _CAPABILITY_BY_BOARD.items() if name in board), None),
        jetpack=_jetpack(_text(root / "etc/nv_tegra_release")),
        driver=_driver(_text(root / "proc/driver/nvidia/version")),
        providers=_providers(packages or _onnxruntime_folder()) if has_gpu else [],
    )


def _providers(folder: Path | None) -> list[str]:
    if folder is None:
        return []
    return [name for name, library in _LIBRARY_BY_PROVIDER.items() if (folder / "capi" / library).exists()]


def _onnxruntime_folder() -> Path | None:
    found = importlib.util.find_spec("onnxruntime")  # finds it without importing it
    return Path(found.origin).parent if found is not None and found.origin else None


def _jetpack(release: str) -> str | None:
    match = re.search(r"R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?", release)
    if match is None:
        return None
    major, minor, patch = int(match[1]), int(match[2]), int(match[3] or 0)
    if major == 36 and float(f"{minor}.{patch}") >= _JETPACK_62_REVISION:
        return "6.2"
    return _JETPACK_BY_L4T.get((major, minor))


def _driver(version: str) -> str | None:
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", version)
    return match[1] if match else None


def _text(path: Path) -> str:
    try:
        return path.read_bytes()[:4096].decode(errors="replace").strip("\0\n ")
    except OSError:
        return ""
