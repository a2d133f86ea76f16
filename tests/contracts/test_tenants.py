"""No tenant hears, reads or changes anything of another: 10,000 pairs of caller and topic or address."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.access_fuzz import fuzz_api, fuzz_topics
from tests.fakes.control import ControlProcess
from tests.fakes.control_app import control_app

IS_WHOLE = os.environ.get("FORESHORE_FAULTS") == "all"
NUM_TOPIC_PAIRS = 8000
NUM_API_PAIRS = 2000 if IS_WHOLE else 400


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path / "control")
    process.start()
    yield process
    assert process.stop() == 0


def test_no_topic_of_another_tenant_or_device_is_heard_or_spoken_on(control: ControlProcess) -> None:
    outcome = fuzz_topics(control, NUM_TOPIC_PAIRS, seed_number=20261124)
    assert outcome.num_pairs >= NUM_TOPIC_PAIRS
    assert outcome.crossings == []
    assert outcome.losses == []


def test_no_address_of_another_tenant_answers(tmp_path: Path) -> None:
    with control_app(tmp_path / "home") as app:
        outcome = fuzz_api(app, NUM_API_PAIRS, seed_number=20261124)
    assert outcome.num_pairs == NUM_API_PAIRS
    assert outcome.crossings == []
