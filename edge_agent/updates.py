"""The shell of one model's state machine: journals each state, then performs its actions.

Actions run one after another in one task per update; an event that arrives meanwhile is decided at once. Loading,
probing, hashing and disk work happen in threads. The old model keeps answering until the new one has soaked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from tuf.api.metadata import TargetFile

from edge_agent.config import Home, Identity, Profile
from edge_agent.engines import Engine, Engines
from edge_agent.fetch import Progress
from edge_agent.journal import Journal
from edge_agent.probe import probe
from edge_agent.runtimes.base import load
from edge_agent.slots import Store
from edge_agent.state import (
    Abandon,
    Action,
    Collect,
    Commit,
    Done,
    Event,
    Failed,
    Healthy,
    Perform,
    Restore,
    RestoreFailed,
    Slot,
    SlotState,
    Wanted,
    from_dict,
    step,
)
from edge_agent.verify import DeviceTrust, RefusedError, check_fresh, open_manifest, open_release
from model_registry.manifest import Manifest, ReleaseArtefact
from wire.errors import ForeshoreError, TimedOutError
from wire.messages import Desired, ModelState, Phase

SOAK_STEP_S = 0.2
WINDOW_STEP_S = 30.0
MAX_ERROR_SHARE = 0.1


class SoakFailedError(ForeshoreError):
    """The new model errs or crawls under real requests."""

    code = "soak_failed"


class Content(Protocol):
    """Where releases, manifests and chunks come from."""

    async def listed(self, model: str, release: str) -> TargetFile:
        """What a publisher's fresh metadata says about a release."""

    async def release(self, digest: str, size_bytes: int) -> bytes:
        """The bytes of a release, no more than `size_bytes`."""

    async def manifest(self, digest: str, size_bytes: int) -> bytes:
        """The bytes of a manifest."""

    async def fetch(self, manifest: Manifest, artefact: ReleaseArtefact, progress: Progress) -> None:
        """Bring every chunk into the store."""


@dataclass(frozen=True)
class Device:
    """What all updates of a device share."""

    home: Home
    identity: Identity
    profile: Profile
    trust: DeviceTrust
    store: Store
    engines: Engines
    content: Content
    desired: Callable[[], Desired | None]
    changed: Callable[[str, SlotState], None]  # report soon
    held: Callable[[], set[str]]  # manifests that any state holds


class Update:
    """One model name on this device."""

    def __init__(self, name: str, device: Device) -> None:
        self._device = device
        self._journal = Journal(device.home.state / f"{name}.journal")
        self.state = from_dict(self._journal.last) if self._journal.last else SlotState(name)
        self.progress = Progress()
        self._candidate: Engine | None = None
        self._artefact: ReleaseArtefact | None = None
        self._work: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._begun_s = 0.0

    async def handle(self, event: Event) -> None:
        """Decide, journal, act."""
        async with self._lock:
            before = self.state
            self.state, actions = step(before, event)
            if self.state != before:
                await asyncio.to_thread(self._journal.append, self.state.to_dict())
                self._device.changed(self.state.name, self.state)
            for action in actions:
                await self._act(action)

    async def close(self) -> None:
        """Stop the work under way; the journal remembers it."""
        await self._stop()

    def report(self) -> ModelState:
        """The state as it is reported."""
        state, wanted = self.state, self.state.wanted
        engine = self._device.engines.find(state.name)
        return ModelState(
            name=state.name,
            active_version=state.committed.version if state.committed else None,
            active_manifest=state.committed.manifest if state.committed else None,
            previous_manifest=state.previous.manifest if state.previous else None,
            phase=state.phase,
            wanted_manifest=wanted.manifest if wanted else None,
            attempt=wanted.attempt if wanted else 0,
            rollout_id=wanted.rollout_id if wanted else None,
            result=state.result,
            reason=state.reason[:2000] if state.reason else None,
            bytes_done=self.progress.bytes_done,
            bytes_total=self.progress.bytes_total,
            wire_bytes=self.progress.wire_bytes,
            encoding=self.progress.encoding,
            runtime=engine.runtime.name if engine else None,
            providers=engine.runtime.providers[:8] if engine else [],
            latency_ms=engine.latency_ms if engine else None,
        )

    async def _act(self, action: Action) -> None:
        match action:
            case Perform(phase=phase, ticket=ticket):
                if phase == Phase.PREFLIGHT:
                    self.progress, self._begun_s = Progress(), time.monotonic()
                self._work = asyncio.create_task(self._perform(phase, ticket), name=f"{self.state.name}-{phase}")
            case Abandon():
                await self._stop()
                self._drop_candidate()
            case Restore(slot=slot):
                await self._restore(slot)
            case Commit(slot=slot):
                self._commit(slot)
                await asyncio.to_thread(self._device.store.point, self.state.name, slot.manifest)
            case Collect():
                await asyncio.to_thread(self._device.store.collect, self._device.held())

    async def _perform(self, phase: Phase, ticket: int) -> None:
        work: dict[Phase, Callable[[Wanted], Awaitable[None]]] = {
            Phase.PREFLIGHT: self._preflight,
            Phase.FETCH: self._fetch,
            Phase.VERIFY: self._verify,
            Phase.WAIT_WINDOW: self._await_window,
            Phase.STAGED: self._load,
            Phase.PROBE: self._probe,
            Phase.SWITCH: self._switch,
            Phase.SOAK: self._soak,
        }
        event: Event = Done(phase, ticket)
        try:
            wanted = self.state.wanted
            assert wanted is not None
            limit_s = self._device.profile.phase_timeout_s + wanted.soak_s
            if phase == Phase.WAIT_WINDOW and wanted.window is not None:
                limit_s += wanted.window.wait_s(time.time())
            async with asyncio.timeout(limit_s):
                await work[phase](wanted)
        except TimeoutError:
            event = Failed(phase, ticket, TimedOutError.code, f"{phase} took more than {limit_s:g} s")
        except ForeshoreError as error:
            event = Failed(phase, ticket, error.code, str(error))
        except Exception as error:  # noqa: BLE001 - top of the task: any other failure ends this update visibly
            event = Failed(phase, ticket, "internal_error", f"{type(error).__name__}: {error}")
        self._work = None
        await self.handle(event)

    async def _stop(self) -> None:
        work, self._work = self._work, None
        if work is not None and work is not asyncio.current_task():
            work.cancel()
            await asyncio.wait([work], timeout=10)

    async def _preflight(self, wanted: Wanted) -> None:
        device = self._device
        desired = device.desired()
        if desired is not None:
            check_fresh(desired, await asyncio.to_thread(device.trust.now))
        if wanted.target not in device.profile.targets:
            raise RefusedError(f"target {wanted.target!r} is not for this device", remedy=str(device.profile.targets))
        manifest = await self._manifest(wanted)
        device.engines.check_fits(manifest, replacing=manifest.name)
        await asyncio.to_thread(device.store.preflight, manifest)

    async def _manifest(self, wanted: Wanted) -> Manifest:
        """The listed release, then the manifest it names; kept in the store."""
        device = self._device
        listed = await device.content.listed(self.state.name, wanted.release)
        _, self._artefact = open_release(
            await device.content.release(wanted.release, listed.length),
            listed,
            digest=wanted.release,
            tenant=device.identity.tenant,
            name=self.state.name,
            manifest=wanted.manifest,
            target=wanted.target,
        )
        held = device.store.find_manifest(wanted.manifest)
        if held is not None:
            return held
        data = await device.content.manifest(wanted.manifest, self._artefact.manifest_bytes)
        manifest = open_manifest(data, wanted.manifest, self.state.name, self._artefact)
        await asyncio.to_thread(device.store.put_manifest, wanted.manifest, data)
        return manifest

    async def _fetch(self, wanted: Wanted) -> None:
        manifest = self._device.store.get_manifest(wanted.manifest)
        if self._device.store.has(wanted.manifest) or self._artefact is None:
            return
        await self._device.content.fetch(manifest, self._artefact, self.progress)

    async def _verify(self, wanted: Wanted) -> None:
        await asyncio.to_thread(self._device.store.complete, self._device.store.get_manifest(wanted.manifest))

    async def _await_window(self, wanted: Wanted) -> None:
        """Wait for the maintenance window; in steps, as the clock may be set meanwhile."""
        while True:
            wait_s = wanted.window.wait_s(time.time()) if wanted.window is not None else 0.0
            if wait_s <= 0:
                return
            await asyncio.sleep(min(wait_s, WINDOW_STEP_S))

    async def _load(self, wanted: Wanted) -> None:
        """Load beside the old model where memory allows it, else in its place."""
        manifest = self._device.store.get_manifest(wanted.manifest)
        try:
            self._device.engines.check_fits(manifest)
        except ForeshoreError:
            self._device.engines.check_fits(manifest, replacing=manifest.name)
            self._retire(self._device.engines.route(manifest.name, None))
        self._candidate = await self._open(wanted.slot)

    async def _probe(self, wanted: Wanted) -> None:
        candidate = self._get_candidate()
        old = self._device.engines.find(self.state.name)
        async with asyncio.timeout(self._device.profile.probe_timeout_s):
            candidate.latency_ms = await asyncio.to_thread(
                probe,
                candidate.manifest,
                self._device.store.files(wanted.manifest),
                candidate.runtime,
                old_latency_ms=old.latency_ms if old else None,
                max_slowdown=self._device.profile.max_slowdown,
            )

    async def _switch(self, wanted: Wanted) -> None:
        self._device.engines.route(self.state.name, self._get_candidate())

    async def _soak(self, wanted: Wanted) -> None:
        candidate = self._get_candidate()
        until = time.monotonic() + wanted.soak_s
        while True:
            if candidate.num_errors and candidate.num_errors > MAX_ERROR_SHARE * candidate.num_requests:
                raise SoakFailedError(
                    f"{candidate.num_errors} of {candidate.num_requests} requests failed", remedy="mend the model"
                )
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, SOAK_STEP_S))

    async def _open(self, slot: Slot) -> Engine:
        store = self._device.store
        manifest = store.get_manifest(slot.manifest)
        runtime = await asyncio.to_thread(load, manifest, store.files(slot.manifest), self._device.profile)
        engine = Engine(slot, manifest, runtime)
        self._device.engines.add(engine)
        return engine

    async def _restore(self, slot: Slot | None) -> None:
        """Let `slot` answer; a model that does not load is told to the state machine."""
        engines, name = self._device.engines, self.state.name
        active = engines.find(name)
        if slot is not None and active is not None and active.slot.manifest == slot.manifest:
            return
        kept = next((e for e in engines.loaded() if slot and e.slot == slot and not e.is_retired), None)
        try:
            engine = kept or (await self._open(slot) if slot else None)
        except Exception as error:  # noqa: BLE001 - whatever keeps it from loading is reported as the result
            code = error.code if isinstance(error, ForeshoreError) else "internal_error"
            assert slot is not None
            self._later(RestoreFailed(slot.manifest, code, str(error)))
            return
        before = engines.route(name, engine)
        if before is not None and before is not self._candidate:
            self._retire(before)
        if slot is None:
            await asyncio.to_thread(self._device.store.point, name, None)
        else:
            await asyncio.to_thread(self._device.store.point, name, slot.manifest)
            self._later(Healthy(), self._device.profile.healthy_after_s)

    def _later(self, event: Event, delay_s: float = 0.0) -> None:
        async def say() -> None:
            await asyncio.sleep(delay_s)
            await self.handle(event)

        self._note = asyncio.create_task(say(), name=f"{self.state.name}-note")

    def _commit(self, slot: Slot) -> None:
        """The candidate stays; every other engine of this name may go."""
        self._candidate = None
        for engine in self._device.engines.loaded():
            if engine.manifest.name == self.state.name and engine.slot.manifest != slot.manifest:
                self._retire(engine)

    def _get_candidate(self) -> Engine:
        if self._candidate is None:
            raise RefusedError("no candidate is loaded", remedy="this is a defect of the agent")
        return self._candidate

    def _drop_candidate(self) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is not None and self._device.engines.find(self.state.name) is not candidate:
            self._retire(candidate)

    def _retire(self, engine: Engine | None) -> None:
        if engine is not None:
            self._device.engines.retire(engine)
