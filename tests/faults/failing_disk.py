"""Builds `failing_disk.c` and says how a process is started under it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


def has_compiler() -> bool:
    return shutil.which("gcc") is not None


class FailingDisk:
    """Faults of one process after another below one folder; `told` are those that happened."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._log = folder / "faults.log"
        self._library = folder / "failing_disk.so"
        self._num_read = 0
        flags = ["-std=gnu11", "-O1", "-shared", "-fPIC"]
        subprocess.run(
            ["gcc", *flags, "-o", str(self._library), str(SOURCE), "-ldl", "-lpthread"], check=True, timeout=60
        )

    def environment(self, plan: str) -> dict[str, str]:
        """Variables for a process that is to meet `plan` (see the C file)."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAULT_ROOT": str(self._root.resolve()),
            "FAULT_PLAN": plan,
            "FAULT_LOG": str(self._log),
        }

    def told(self) -> list[str]:
        """Lines `kind call path` since the last call."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        new, self._num_read = lines[self._num_read :], len(lines)
        return new
