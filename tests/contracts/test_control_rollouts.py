"""Rollouts through the real control plane: two on one device, approval, joining, retrying, going back, kill -9."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.control import ControlProcess, FakeDevice, wait_until

ENDS = ("succeeded", "halted", "rolled_back")


class Site:
    """A control plane with devices on its broker."""

    def __init__(self, control: ControlProcess) -> None:
        self.control = control
        self.devices: list[FakeDevice] = []

    def device(self, name: str, behaviour: str = "ok") -> FakeDevice:
        device = FakeDevice(self.control, name, behaviour)
        self.devices.append(device)
        device.connect()
        wait_until(lambda: self.control.ok("GET", f"/devices/{name}")["reported"], f"{name} reports")
        return device

    def roll_out(self, release: dict[str, Any], **more: Any) -> str:
        order = {"release": release["release"], "start": True, **more}
        return str(self.control.ok("POST", "/rollouts", order)["rollout_id"])

    def steer(self, rollout_id: str, order: str, **more: Any) -> Any:
        return self.control.ok("POST", f"/rollouts/{rollout_id}/{order}", {}, **more)

    def await_status(self, rollout_id: str, *statuses: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def look() -> bool:
            found.update(self.control.ok("GET", f"/rollouts/{rollout_id}"))
            return found["status"] in statuses

        wait_until(look, f"{rollout_id} is {statuses}")
        return found

    def clear(self) -> None:
        for device in self.devices:
            device.close()
            self.control.call("DELETE", f"/devices/{device.device_id}")
        self.devices.clear()


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlProcess]:
    process = ControlProcess(tmp_path_factory.mktemp("rollouts"))
    process.start()
    yield process
    assert process.stop() == 0


@pytest.fixture
def site(control: ControlProcess) -> Iterator[Site]:
    site = Site(control)
    yield site
    site.clear()


def runs(device: FakeDevice) -> dict[str, str]:
    return {model.name: model.version for model in device.desired.models} if device.desired else {}


def test_two_rollouts_on_one_device_leave_each_others_models_alone(site: Site) -> None:
    both, one = site.device("both"), site.device("one")
    control = site.control
    control.ok("POST", "/groups", {"name": "left", "device_ids": ["both", "one"]})
    control.ok("POST", "/groups", {"name": "right", "filter": "device = bo* and target = cpu-x86"})
    eyes, ears = control.publish("eyes", os.urandom(500), "1.0"), control.publish("ears", os.urandom(500), "1.0")
    first, second = site.roll_out(eyes, group="left"), site.roll_out(ears, group="right")
    site.await_status(first, "succeeded")
    site.await_status(second, "succeeded")
    wait_until(lambda: runs(both) == {"eyes": "1.0", "ears": "1.0"}, "both models")
    assert runs(one) == {"eyes": "1.0"}
    site.steer(first, "rollback")
    site.await_status(first, "rolled_back")
    wait_until(lambda: runs(both) == {"ears": "1.0"}, "only its own model went")


def test_rolling_back_in_any_order_never_brings_back_what_was_rolled_back(site: Site) -> None:
    device = site.device("chain")
    old, middle, new = (site.control.publish("chain", os.urandom(500), version) for version in ("1.0", "2.0", "3.0"))
    ids = []
    for release in (old, middle, new):
        ids.append(site.roll_out(release))
        site.await_status(ids[-1], "succeeded")
    site.steer(ids[1], "rollback")  # the newest rollout decides about this device, so nothing changes there
    found = site.await_status(ids[1], "rolled_back")
    assert found["devices"][0]["state"] == "skipped"
    assert runs(device) == {"chain": "3.0"}
    site.steer(ids[2], "rollback")
    site.await_status(ids[2], "rolled_back")
    wait_until(lambda: runs(device) == {"chain": "1.0"}, "the last version that still stands")


def test_whoever_made_a_rollout_cannot_approve_it_and_another_person_can(site: Site) -> None:
    device, control = site.device("judged"), site.control
    anna = control.ok("POST", "/tokens", {"name": "anna", "role": "operator"})["token"]
    bert = control.ok("POST", "/tokens", {"name": "bert", "role": "operator"})["token"]
    vera = control.ok("POST", "/tokens", {"name": "vera", "role": "viewer"})["token"]
    release = control.publish("judged", os.urandom(500), "1.0")
    order = {"release": release["release"], "approval": "operator", "start": True}
    rollout_id = control.ok("POST", "/rollouts", order, token=anna)["rollout_id"]
    assert control.call("POST", f"/rollouts/{rollout_id}/start", {}, token=bert).status_code == 409
    refused = control.call("POST", f"/rollouts/{rollout_id}/approve", {}, token=anna)
    assert (refused.status_code, refused.json()["code"]) == (403, "not_allowed")
    assert control.call("POST", f"/rollouts/{rollout_id}/approve", {}, token=vera).status_code == 403
    assert not device.desired.models
    site.steer(rollout_id, "approve", token=bert)
    assert site.await_status(rollout_id, "succeeded")["approved_by"] == "bert"


def test_two_rollouts_of_one_model_do_not_steer_one_device_at_the_same_time(site: Site) -> None:
    control = site.control
    site.device("busy-a", "silent")
    site.device("busy-b")
    control.ok("POST", "/groups", {"name": "busy-one", "device_ids": ["busy-a"]})
    control.ok("POST", "/groups", {"name": "busy-two", "device_ids": ["busy-b"]})
    release = control.publish("busy", os.urandom(500), "1.0")
    first = site.roll_out(release, group="busy-one")
    body = {"release": release["release"], "group": "busy-one"}
    refused = control.call("POST", "/rollouts", {**body, "start": True})
    assert refused.status_code == 409
    assert "still under way on busy-a" in refused.json()["detail"]
    draft = control.ok("POST", "/rollouts", body)["rollout_id"]
    assert control.call("POST", f"/rollouts/{draft}/start", {}).status_code == 409
    site.await_status(site.roll_out(release, group="busy-two"), "succeeded")  # another device is free
    site.steer(first, "halt")
    site.steer(draft, "start")
    site.steer(draft, "halt")


def test_a_halted_rollout_retries_only_what_failed(site: Site) -> None:
    site.control.ok("POST", "/groups", {"name": "retry", "filter": "device = retry-*"})
    bad, good = site.device("retry-a", "fail"), site.device("retry-b")
    release = site.control.publish("retry", os.urandom(500), "bad-1")
    rollout_id = site.roll_out(release, group="retry", waves=[{"percent": 100}], gate={"max_failures": 0})
    halted = site.await_status(rollout_id, "halted")
    assert halted["counts"]["failed"] == 1
    before = good.desired.generation if good.desired else 0
    bad.behaviour = "ok"
    site.steer(rollout_id, "retry")
    done = site.await_status(rollout_id, "succeeded")
    slots = {one["device_id"]: one for one in done["devices"]}
    assert (slots["retry-a"]["state"], slots["retry-a"]["attempts"]) == ("succeeded", 2)
    assert (good.desired.generation if good.desired else 0) == before


def test_a_halted_rollout_is_rolled_back_without_waiting_for_those_that_are_back(site: Site) -> None:
    site.control.ok("POST", "/groups", {"name": "back", "filter": "device = back-*"})
    fine = site.device("back-a")
    failing = site.device("back-b", "fail")
    release = site.control.publish("back", os.urandom(500), "bad-1")
    order = {"waves": [{"count": 1}], "device_timeout_s": 3600, "group": "back"}
    rollout_id = site.roll_out(release, **order)
    site.await_status(rollout_id, "halted")
    wait_until(lambda: runs(failing) == {}, "the failed device's wish goes back")
    site.steer(rollout_id, "rollback")
    found = site.await_status(rollout_id, "rolled_back")
    assert {one["state"] for one in found["devices"]} == {"returned"}
    wait_until(lambda: runs(fine) == {}, "the wish goes back")


def test_a_new_device_joins_a_finished_rollout_of_its_group(site: Site) -> None:
    site.control.ok("POST", "/groups", {"name": "joiners", "filter": "device = join-* and not label.hold = yes"})
    site.device("join-a")
    release = site.control.publish("join", os.urandom(500), "1.0")
    rollout_id = site.roll_out(release, group="joiners", joins=True)
    site.await_status(rollout_id, "succeeded")
    late, stranger = site.device("join-b"), site.device("other")
    wait_until(lambda: runs(late) == {"join": "1.0"}, "the newcomer gets it")
    site.await_status(rollout_id, "succeeded")
    site.control.ok("PUT", "/groups/joiners", {"filter": "device = join-* or label.site = dock"})
    assert runs(stranger) == {}
    site.control.ok("PUT", "/devices/other/labels", {"labels": {"site": "dock"}})
    wait_until(lambda: runs(stranger) == {"join": "1.0"}, "a label brings a device in")
    done = site.await_status(rollout_id, "succeeded")
    assert [wave["is_joined"] for wave in done["waves"]] == [False, True]


def test_a_paced_rollout_reaches_devices_one_by_one(site: Site) -> None:
    site.control.ok("POST", "/groups", {"name": "paced", "filter": "device = paced-*"})
    devices = [site.device(f"paced-{number}") for number in range(3)]
    release = site.control.publish("paced", os.urandom(500), "1.0")
    rollout_id = site.roll_out(release, group="paced", pace={"per_minute": 40})
    first = site.control.ok("GET", f"/rollouts/{rollout_id}")
    assert sum(one["attempts"] for one in first["devices"]) == 1
    site.await_status(rollout_id, "succeeded")
    assert all(runs(device) == {"paced": "1.0"} for device in devices)


def test_a_window_travels_with_the_wish_and_not_with_the_way_back(site: Site) -> None:
    device = site.device("night")
    window = {"opens_s": 7200, "lasts_s": 3600, "weekdays": [5, 6]}
    old, new = (site.control.publish("night", os.urandom(500), version) for version in ("1.0", "2.0"))
    for release in (old, new):
        rollout_id = site.roll_out(release, window=window)
        site.await_status(rollout_id, "succeeded")
        assert device.desired is not None
        wish = device.desired.models[0].window
        assert wish is not None
        assert (wish.opens_s, wish.weekdays) == (7200, (5, 6))
    site.steer(rollout_id, "rollback")
    site.await_status(rollout_id, "rolled_back")
    wait_until(lambda: runs(device) == {"night": "1.0"}, "it goes back")
    assert device.desired.models[0].window is None


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"pace": {"per_minute": 0}}, "pace.per_minute"),
        ({"window": {"opens_s": 90_000, "lasts_s": 60}}, "window.opens_s"),
        ({"window": {"opens_s": 0, "lasts_s": 60, "weekdays": [1, 1]}}, "once"),
        ({"approval": "viewer"}, "approval"),
        ({"waves": [{"count": 1, "percent": 5}]}, "not understood"),
        ({"group": "nowhere"}, "does not exist"),
    ],
)
def test_a_wrong_order_is_refused_with_what_is_wrong(site: Site, order: dict[str, Any], words: str) -> None:
    release = site.control.publish("wrong", os.urandom(100))
    answer = site.control.call("POST", "/rollouts", {"release": release["release"], **order})
    assert answer.status_code in (404, 422)
    assert words in answer.json()["detail"]


@pytest.mark.faults
def test_a_rollout_in_its_second_wave_goes_on_after_kill_9_and_nobody_is_asked_twice(tmp_path: Path) -> None:
    control = ControlProcess(tmp_path / "control")
    control.start()
    site = Site(control)
    try:
        canary = site.device("kill-a")
        others = [site.device(f"kill-{letter}", "silent") for letter in "bcd"]
        release = control.publish("kill", os.urandom(500), "1.0")
        rollout_id = site.roll_out(release, waves=[{"count": 1}, {"count": 2}], group="all", pace={"per_minute": 600})
        wait_until(lambda: sum(runs(one) == {"kill": "1.0"} for one in [canary, *others]) >= 2, "the second wave")
        control.kill()
        for one in others:
            one.behaviour = "ok"
            if one.desired is not None:  # it works while the control plane is away, and its broker too
                one.received.clear()
                one.desired = None
        control.start()
        done = site.await_status(rollout_id, *ENDS)
        assert done["status"] == "succeeded"
        assert {one["attempts"] for one in done["devices"]} == {1}
        assert control.ok("GET", "/audit/verify")["is_whole"]
    finally:
        site.clear()
        assert control.stop() == 0
