"""Ninety days without the control plane, with clocks anywhere between 1970 and ten years ahead: the device serves.

Time, network, clock and power are played; trust metadata, its checks and the state machine are the device's own. After
each story the network and the clock are right again, and nobody lends a hand.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.state import (
    Done,
    Event,
    Failed,
    Healthy,
    Perform,
    Restarted,
    SlotState,
    TrustRenewed,
    Wanted,
    Wish,
    step,
)
from edge_agent.verify import DeviceTrust, check_fresh
from model_registry.trust.client import TrustClient
from model_registry.trust.clock import TrustedClock
from model_registry.trust.errors import MetadataUnavailableError
from tests.fakes.trust import MemoryTrust
from tests.unit.test_registry_trust_client import release
from wire.errors import ForeshoreError
from wire.messages import Desired, Phase

START = datetime(2027, 1, 1, tzinfo=UTC)
DAYS_OFFLINE = 90
NUM_LIVES = int(os.environ.get("FORESHORE_LIVES", "4"))
CLOCKS = {
    "right": timedelta(0),
    "1970": datetime(1970, 1, 1, tzinfo=UTC) - START,
    "ahead": timedelta(days=3650),
}


@dataclass(frozen=True)
class Day:
    """What happens on one day off line."""

    clock: str
    is_reboot: bool
    is_released: bool


DAYS = st.lists(
    st.builds(Day, st.sampled_from(sorted(CLOCKS)), st.booleans(), st.booleans()),
    min_size=DAYS_OFFLINE,
    max_size=DAYS_OFFLINE,
)


class Life:
    """A control plane that goes on releasing and a device that may not hear of it."""

    def __init__(self, folder: Path) -> None:
        self.time, self.clock, self.is_online = START, "right", True
        self.trust = MemoryTrust(folder / "desk", lambda: self.time)
        self.sequence = 0
        self.folder = folder / "device"
        TrustClient.initialise(self.folder, self.trust.counter.repository.roots[0])
        self.state = SlotState("vision")
        self.desired: Desired | None = None
        self.sent: Desired | None = None
        self.boot()

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        if not self.is_online:
            raise MetadataUnavailableError("no network", remedy="wait")
        return self.trust.fetch(name, max_bytes)

    def boot(self) -> None:
        clock = TrustedClock(lambda: self.time + CLOCKS[self.clock])
        self.device = DeviceTrust(TrustClient(self.folder, self, clock))
        self.seen = 0
        self.say(Restarted())
        self.say(Healthy())  # its model loads and answers

    def release(self) -> None:
        self.sequence += 1
        made = release(f"1.0.{self.sequence}", self.sequence)
        self.trust.list_release(made)
        self.sent = Desired(
            tenant="acme", device_id="edge-1", generation=self.sequence, issued_at=self.time,
            expires_at=self.time + timedelta(days=30),
        )  # fmt: skip
        self.wanted = Wanted(f"{self.sequence:064x}", made.version, made.digest)

    def hear(self) -> None:
        """A round of the agent: metadata, the retained wish, what waited for either."""
        self.trust.counter.renew()
        if self.is_online:
            try:
                self.device.refresh()
                self.device.director()
                is_newer = self.desired is None or self.sent != self.desired
                self.desired = self.sent
                self.say(Wish(self.wanted))
                if is_newer:
                    self.say(TrustRenewed())
            except ForeshoreError:
                return
        if self.device.num_renewals != self.seen:
            self.seen = self.device.num_renewals
            self.say(TrustRenewed())

    def say(self, event: Event) -> None:
        todo = [event]
        while todo:
            self.state, actions = step(self.state, todo.pop(0))
            todo += [self.perform(action) for action in actions if isinstance(action, Perform)]

    def perform(self, action: Perform) -> Event:
        wanted = self.state.wanted
        assert wanted is not None
        try:
            if action.phase == Phase.PREFLIGHT:
                assert self.desired is not None
                check_fresh(self.desired, self.device.now())
                self.device.find_release("vision", wanted.release)
        except ForeshoreError as error:
            return Failed(action.phase, action.ticket, error.code, str(error))
        return Done(action.phase, action.ticket)


@settings(max_examples=NUM_LIVES, deadline=None)
@given(days=DAYS, first=st.sampled_from(sorted(CLOCKS)))
def test_ninety_days_off_line_it_serves_and_afterwards_it_converges_without_a_hand(days: list[Day], first: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        life = Life(Path(folder))
        life.release()
        life.hear()
        served = life.state.runnable
        assert served is not None
        life.is_online = False
        for day in days:
            life.time += timedelta(days=1)
            life.clock = day.clock
            if day.is_released:
                life.release()
            if day.is_reboot:
                life.boot()
            life.hear()
            assert life.state.runnable == served
        life.is_online, life.clock = True, first  # the network may be back before the clock is
        life.hear()
        assert life.state.runnable is not None
        life.clock = "right"
        for _ in range(2):
            life.time += timedelta(minutes=10)
            life.hear()
        assert life.state.runnable is not None
        assert life.state.runnable.release == life.wanted.release


@settings(max_examples=NUM_LIVES, deadline=None)
@given(clock=st.sampled_from(["1970", "ahead"]), num_days=st.integers(31, 360))
def test_a_wrong_clock_never_installs_by_expired_metadata(clock: str, num_days: int) -> None:
    """The device holds an assignment of a listed release, off line, until all but the offline roles has expired."""
    with tempfile.TemporaryDirectory() as folder:
        life = Life(Path(folder))
        life.release()
        life.hear()
        served = life.state.runnable
        life.release()
        life.device.refresh()
        life.time += timedelta(days=num_days)
        life.trust.counter.renew()
        life.device.refresh()  # proves the time once; then the network goes and the clock with it
        life.is_online, life.clock, life.desired = False, clock, life.sent
        life.boot()
        life.say(Wish(life.wanted))
        assert life.state.runnable == served
        assert (life.state.reason or "").partition(":")[0] in {"expired_wish", "expired_metadata"}
