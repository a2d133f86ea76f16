"""The offload policy and the outbox."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from edge_agent.config import PROFILES, load_profile
from edge_agent.offload import Request, Situation, choose
from edge_agent.outbox import Outbox
from wire.decision import Decision, from_dict, replay

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BOTH = {"model_is_here": True, "context_tokens": 512, "has_gateway": True, "cloud_is_reachable": True}


def _choose(request: Request, **situation: object) -> Decision:
    decision = choose(request, Situation(**{**BOTH, **situation}), decision_id="d", now=NOW)  # type: ignore[arg-type]
    assert replay(from_dict(decision.to_dict())) == decision.chosen
    return decision


def test_a_short_request_stays_on_the_device() -> None:
    assert _choose(Request("chat", 10, 32)).chosen == "device"


def test_a_missing_model_a_long_prompt_or_a_full_queue_goes_to_the_cloud_and_says_why() -> None:
    assert "not on this device" in _choose(Request("chat", 10, 32), model_is_here=False).reason
    assert "exceed" in _choose(Request("chat", 600, 32)).reason
    full = _choose(Request("chat", 10, 32), queue_is_full=True)
    assert (full.chosen, "queue is full" in full.reason) == ("cloud", True)


def test_a_private_request_never_leaves() -> None:
    assert _choose(Request("chat", 600, 32, is_local_only=True)).chosen is None
    assert _choose(Request("chat", 10, 32, is_local_only=True, prefer="cloud")).chosen == "device"


def test_a_preference_decides_when_both_can() -> None:
    assert _choose(Request("chat", 10, 32, prefer="cloud")).chosen == "cloud"
    assert _choose(Request("chat", 10, 32, prefer="cloud"), cloud_is_reachable=False).chosen == "device"


def test_the_outbox_drops_the_oldest_of_the_lowest_priority(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", 64 * 1024)
    alarm = outbox.add("alarm", {"text": "x" * 1000})
    for number in range(200):
        outbox.add("metric", {"number": number, "text": "x" * 1000})
    assert outbox.size_bytes <= 64 * 1024
    assert outbox.num_dropped > 100
    kept = outbox.oldest(500)
    assert kept[0][0] == alarm
    outbox.confirm([name for name, _ in kept])
    assert outbox.oldest() == []
    outbox.close()


def test_every_shipped_profile_loads() -> None:
    names = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    assert {"jetson-orin-nano", "cpu-standard", "cpu-small"} <= set(names)
    assert [load_profile(name).name for name in names] == names
