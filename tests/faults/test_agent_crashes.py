"""A real agent killed, cut and failed at any system call: a seeded sample here, all with `scripts/test --faults`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.agent_crashes import CrashRun
from tests.faults.failing_disk import has_compiler

pytestmark = [pytest.mark.faults, pytest.mark.beside]
ALL = os.environ.get("FORESHORE_FAULTS") == "all"


@pytest.mark.skipif(not has_compiler(), reason="needs gcc for the failing disk")
@pytest.mark.timeout(6 * 3600 if ALL else 600)
def test_no_kill_and_no_torn_write_leaves_a_device_without_its_model(tmp_path: Path) -> None:
    run = CrashRun(tmp_path, seed=11)
    try:
        figures = run.run(*((2000, 500) if ALL else (70, 30)))
    finally:
        run.close()
    assert figures.findings == []
    assert figures.states_without_model == figures.wrong_digests == figures.stuck_updates == 0
    assert figures.refetched_bytes_max == 0
