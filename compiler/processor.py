"""What this machine's processor computes 8-bit graphs with; decides whether a gate may use its kernels."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_VNNI = {"avx512_vnni", "avx_vnni"}


@functools.cache
def tensor_kernels() -> str:
    """The name that targets give to arithmetic like this processor's: "x86-avx2", "x86-vnni", "arm"."""
    if platform.machine() in ("aarch64", "arm64"):
        return "arm"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "x86-avx2"
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return "x86-vnni" if _VNNI & set(flags) else "x86-avx2"
