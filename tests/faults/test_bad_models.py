"""Seeded bad models on a real agent: a sample here, all with `scripts/test --faults`.

It wants the machine for itself: one of the reasons to refuse a model is that it is slower than the one before.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.bad_models import BadModelRun

pytestmark = [pytest.mark.faults, pytest.mark.alone]
ALL = os.environ.get("FORESHORE_FAULTS") == "all"


@pytest.mark.timeout(6 * 3600 if ALL else 300)
def test_bad_models_are_caught_for_their_own_reason(tmp_path: Path) -> None:
    run = BadModelRun(tmp_path, seed=1)
    try:
        figures = run.run(200 if ALL else 8)
    finally:
        run.close()
    assert figures.findings == []
    assert figures.num_reason_right == figures.num_caught == figures.num_models
