"""Updates on a real small file system that is now fuller, now emptier: refused before they begin, or done.

One agent lives on a tmpfs of its own (root is needed to mount it). Before each trial something else takes a random
part of it; a model of random size is wished for. Either it fits and is committed, or preflight refuses it with both
numbers; both slots stay whole.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent.journal import Journal
from edge_agent.slots import RESERVE_BYTES
from edge_agent.state import from_dict
from tests.fakes.agent_plane import AgentProcess, Plane
from tests.faults.agent_crashes import is_whole

PROFILE = """
name: test
targets: [cpu-x86]
memory_budget_bytes: 500000000
fetch_stall_s: 2
healthy_after_s: 0.2
"""
DISK_BYTES = 48 << 20
MAX_MODEL_BYTES = 6 << 20
NUM_FILLINGS = 100
UPDATE_S = 90.0
REFUSAL = re.compile(r"insufficient_space: the model needs \d+ bytes of disk and \d+ are free")


@dataclass
class Figures:
    """What a run counted."""

    num_trials: int = 0
    num_refused: int = 0
    enospc_in_mid_update: int = 0
    lost_slots: int = 0
    results: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A file system of `DISK_BYTES` on `folder`; raises `CalledProcessError` where that is not allowed."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True, timeout=10)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


class SmallDiskRun:
    """A device whose home is `disk`, a mounted file system."""

    def __init__(self, folder: Path, disk: Path, seed: int) -> None:
        self.figures = Figures()
        self.disk = disk
        self._random = random.Random(seed)
        self.plane = Plane(folder / "plane")
        profile = folder / "profile.yaml"
        profile.write_text(PROFILE)
        self.agent = AgentProcess(disk / "home", port_file=folder / "agent.port", log=folder / "agent.log")
        self.agent.enrol(self.plane.url, str(profile))
        self.agent.start()
        self.wish(2.0, 1 << 20)

    def close(self) -> None:
        self.agent.stop()
        self.plane.close()

    def run(self, num_trials: int) -> Figures:
        for number in range(num_trials):
            self._try(number)
        return self.figures

    def wish(self, scale: float, size_bytes: int) -> dict[str, Any]:
        """How the update to a model of this size ended."""
        version = f"{scale:g}.0.{self.plane.generation}"
        self.plane.forget_content()
        self.plane.wish(self.plane.publish(scale, version, padding_bytes=size_bytes))
        return self.plane.await_model(lambda m: m.get("result") is not None, UPDATE_S)

    def leave_free(self, free_bytes: int) -> None:
        """Take or give back disk until about `free_bytes` are left; the agent may write meanwhile."""
        filler = self.disk / "filler"
        filler.touch()
        for _ in range(NUM_FILLINGS):
            held = filler.stat().st_blocks * 512
            status = os.statvfs(self.disk)
            wanted = max(0, held + status.f_bavail * status.f_frsize - free_bytes)
            with filler.open("r+b") as file, contextlib.suppress(OSError):
                file.truncate(wanted)
                if wanted:
                    os.posix_fallocate(file.fileno(), 0, wanted)
                return
        raise AssertionError(f"the disk could not be filled up to {free_bytes} bytes: {os.statvfs(self.disk)}")

    def _try(self, number: int) -> None:
        size_bytes = self._random.randrange(4096, MAX_MODEL_BYTES)
        self.leave_free(max(0, RESERVE_BYTES + size_bytes + self._random.randrange(-size_bytes, size_bytes)))
        ended = self.wish(10.0 + number, size_bytes)
        reason = ended.get("reason") or ""
        self.figures.num_trials += 1
        self.figures.results[f"{ended['result']} {reason.split(':')[0]}".strip()] += 1
        if ended["result"] != "succeeded":
            self.figures.num_refused += 1
            if not REFUSAL.match(reason) or ended["result"] != "failed_no_change":
                self.figures.enospc_in_mid_update += 1
                self.figures.findings.append(f"{number}: {ended}")
        self._look(number)

    def _look(self, number: int) -> None:
        home = self.disk / "home"
        state = from_dict(Journal(home / "state" / "tiny.journal").last or {})
        for slot in (state.committed, state.previous):
            is_missing = slot is None and number > 0 and self.figures.results["succeeded"] > 1
            if is_missing or (slot and not is_whole(home / "store" / "artefacts" / slot.manifest)):
                self.figures.lost_slots += 1
                self.figures.findings.append(f"{number}: a slot is not whole: {state}")
