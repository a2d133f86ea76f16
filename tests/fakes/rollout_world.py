"""A world for the rollout engine: devices that obey, fail or say nothing, over a network that loses and repeats.

`play(seed)` drives one rollout through a random order of events and checks, after each event, what must hold. The
checks keep their own books: they read the engine's actions and the outcomes, not its verdicts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from cloud.control import rollout
from cloud.control.rollout import Gate, Offer, Pace, Slot, Status, Terms, Withdraw
from wire.errors import ConflictError
from wire.window import Window

FAILED = (Slot.FAILED, Slot.TIMED_OUT)
LEFT_OUT = (Slot.SKIPPED, Slot.WITHDRAWN)
BEHAVIOURS = ("obeys", "obeys", "obeys", "fails", "is silent", "is slow")
TIMEOUT_S = 60.0


@dataclass
class World:
    """One rollout and all that happens around it."""

    random: random.Random
    state: rollout.State
    behaviours: dict[str, str]
    now: float = 1_000_000.0
    in_flight: list[tuple[float, rollout.Event]] = field(default_factory=list)
    num_offers: dict[str, int] = field(default_factory=dict)
    num_retries: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    offered_at: list[tuple[float, int]] = field(default_factory=list)

    def happen(self, event: rollout.Event) -> None:
        """One event; an order that the state refuses changes nothing."""
        before = self.state
        try:
            self.state, actions = rollout.step(before, event)
        except ConflictError:
            return
        if isinstance(event, rollout.RetriedFailed):
            self.num_retries += 1
        if isinstance(event, rollout.Joined):
            for name in event.device_ids:
                if name in self.state.devices and name not in before.devices:
                    wave = self.state.devices[name].wave
                    self.sizes[wave] = self.sizes.get(wave, 0) + 1
        self._check(before, event, actions)
        for action in actions:
            if isinstance(action, Offer):
                self._send(action.device_ids)
            elif isinstance(action, Withdraw):
                for name in action.device_ids:
                    if self.random.random() < 0.8:
                        self.in_flight.append((self._soon(), rollout.Returned(name)))

    def _soon(self) -> float:
        return self.now + self.random.choice((0.0, 1.0, 5.0, 30.0, 90.0))

    def _send(self, device_ids: tuple[str, ...]) -> None:
        """What the offered devices will say: perhaps lost, perhaps twice, perhaps late."""
        for name in device_ids:
            behaviour, at = self.behaviours[name], self._soon()
            says: list[rollout.Event] = [rollout.Progressed(name, "fetch"), rollout.Progressed(name, "probe")]
            if behaviour == "fails":
                says.append(rollout.Failed(name, 0.0, "probe_failed"))
            elif behaviour != "is silent":
                says.append(rollout.Succeeded(name, 0.0))
                at += TIMEOUT_S * 1.5 if behaviour == "is slow" else 0.0
            for event in says:
                for _ in range(self.random.choice((0, 1, 1, 1, 1, 1, 2, 3))):
                    self.in_flight.append((at + self.random.random() * 10, event))

    def _check(self, before: rollout.State, event: rollout.Event, actions: tuple[rollout.Action, ...]) -> None:
        after = self.state
        offers = [action.device_ids for action in actions if isinstance(action, Offer)]
        breached = is_breached(after)
        if before.status in (Status.RUNNING, Status.PAUSED) and breached:  # halt within one event
            assert after.status in (Status.HALTED, Status.ROLLING_BACK, Status.ROLLED_BACK), (event, after)
            assert not offers
        if after.status in (Status.HALTED, *rollout.ENDS):
            assert not any(device.slot in (Slot.OFFERED, Slot.PENDING) for device in after.devices.values())
        for names in offers:
            assert after.status in (Status.RUNNING, Status.SUCCEEDED)
            assert not breached
            assert not after.terms.approval_role or after.approved_by
            self._check_exposure(names)
            self._check_waves(after, names)
        if offers and after.terms.pace is not None:
            self._check_pace(after.terms.pace, sum(len(names) for names in offers))
        for device in after.devices.values():
            assert (device.deadline is not None) == (device.slot in (Slot.OFFERED, Slot.RETURNING))

    def _check_exposure(self, names: tuple[str, ...]) -> None:
        for name in names:
            self.num_offers[name] = self.num_offers.get(name, 0) + 1
            assert self.num_offers[name] <= 1 + self.num_retries, f"{name} was offered too often"
        exposed: dict[int, int] = {}
        for name in self.num_offers:
            wave = self.state.devices[name].wave
            exposed[wave] = exposed.get(wave, 0) + 1
        assert all(count <= self.sizes[wave] for wave, count in exposed.items())

    @staticmethod
    def _check_waves(after: rollout.State, names: tuple[str, ...]) -> None:
        """A wave is offered only when each wave before it went far and well enough."""
        newest = max(after.devices[name].wave for name in names)
        assert newest <= after.wave
        for wave in range(newest):
            counted = [d.slot for d in after.devices.values() if d.wave == wave and d.slot not in LEFT_OUT]
            assert Slot.PENDING not in counted
            if wave == newest - 1:
                settled = [slot for slot in counted if slot is Slot.SUCCEEDED or slot in FAILED]
                assert len(settled) >= after.terms.gate.min_settled_ratio * len(counted)

    def _check_pace(self, pace: Pace, count: int) -> None:
        fastest = max(pace.max_per_minute, pace.per_minute) if pace.factor > 1 else pace.per_minute
        self.offered_at.append((self.now, count))
        total = 0
        for at, number in reversed(self.offered_at):
            total += number
            assert total <= max(1.0, fastest / 6) + fastest * (self.now - at) / 60 + 1e-6

    def deliver_due(self) -> None:
        """Hand over what has arrived by now, in any order."""
        due = [event for at, event in self.in_flight if at <= self.now]
        self.in_flight = [(at, event) for at, event in self.in_flight if at > self.now]
        self.random.shuffle(due)
        for event in due:
            if isinstance(event, rollout.Succeeded):
                event = rollout.Succeeded(event.device_id, self.now)
            elif isinstance(event, rollout.Failed):
                event = rollout.Failed(event.device_id, self.now, event.reason)
            self.happen(event)


def is_breached(state: rollout.State) -> bool:
    """The gate, judged the long way."""
    gate = state.terms.gate
    if sum(device.slot in FAILED for device in state.devices.values()) > gate.max_failures:
        return True
    for wave in range(state.wave + 1):
        slots = [d.slot for d in state.devices.values() if d.wave == wave and d.slot not in LEFT_OUT]
        best = sum(slot not in FAILED for slot in slots)
        if best < gate.min_success_ratio * len(slots):
            return True
    return False


def make_world(seed: int) -> World:
    """A random rollout that waits to be started."""
    rng = random.Random(seed)
    names = [f"d{number}" for number in range(rng.randint(0, 10))]
    waves = [
        rng.choice(({"count": 1}, {"count": 3}, {"percent": 30}, {"percent": 60})) for _ in range(rng.randint(0, 3))
    ]
    planned = rollout.plan_waves(names, waves)
    terms = Terms(
        gate=Gate(rng.choice((0, 0, 1, 3)), rng.choice((0.0, 0.5, 0.8, 1.0)), rng.choice((1.0, 1.0, 0.5, 0.0))),
        device_timeout_s=TIMEOUT_S,
        pace=rng.choice((None, None, Pace(2), Pace(30), Pace(1, 2.0, 2, 60))),
        window=rng.choice((None, None, Window(rng.randrange(86_400), 3600))),
        approval_role=rng.choice((None, None, "operator")),
        starts_when_approved=rng.random() < 0.5,
    )
    skipped = {"misfit": "no artefact for it"} if rng.random() < 0.2 else {}
    behaviours = {name: rng.choice(BEHAVIOURS) for name in (*names, "j0", "j1", "j2")}
    sizes = {number: len(wave) for number, wave in enumerate(planned)}
    return World(rng, rollout.new(planned, terms, skipped), behaviours, sizes=sizes)


def play(seed: int) -> World:
    """One rollout to its end."""
    world = make_world(seed)
    rng = world.random
    if rng.random() < 0.9:
        world.happen(rollout.Approved("second", world.now))
        world.happen(rollout.Started(world.now))
    for _ in range(rng.randint(5, 40)):
        world.now += rng.choice((0.0, 0.2, 1.0, 5.0, 20.0, 70.0))
        world.deliver_due()
        world.happen(_random_event(world))
    settle(world)
    return world


def settle(world: World) -> None:
    """People stop meddling and time goes on: whatever was started ends."""
    state = world.state
    if state.status is Status.AWAITING_APPROVAL:
        world.happen(rollout.Approved("second", world.now))
    if world.state.status in (Status.DRAFT, Status.PAUSED):
        world.happen(rollout.Started(world.now))
    for _ in range(200):
        if world.state.status in rollout.ENDS:
            return
        world.now += 30.0 if world.state.terms.window is None else 20_000.0
        world.deliver_due()
        world.happen(rollout.Ticked(world.now))
    raise AssertionError(f"the rollout does not end: {world.state}")


def _random_event(world: World) -> rollout.Event:
    rng, now = world.random, world.now
    name = rng.choice([*world.behaviours])
    kind = rng.choices(
        ("tick", "pause", "start", "halt", "rollback", "retry", "approve", "joined", "removed", "stray"),
        (60, 4, 6, 1, 1, 3, 2, 3, 1, 4),
    )[0]
    match kind:
        case "tick":
            return rollout.Ticked(now)
        case "pause":
            return rollout.Paused()
        case "start":
            return rollout.Started(now)
        case "halt":
            return rollout.Halted("asked")
        case "rollback":
            return rollout.RollBack(now)
        case "retry":
            return rollout.RetriedFailed(now)
        case "approve":
            return rollout.Approved("second", now)
        case "joined":
            return rollout.Joined((rng.choice(("j0", "j1", "j2")),), now)
        case "removed":
            return rollout.Removed(name, now)
    return rng.choice(
        (
            rollout.Succeeded(name, now), rollout.Failed(name, now, "stray"), rollout.Returned(name),
            rollout.Progressed("stranger", "fetch"), rollout.Ticked(now - 1000.0),
        )
    )  # fmt: skip
