"""The shell of one model's state machine: journals each state, then performs its actions.

Actions run one after another in one task per update; an event that arrives meanwhile is decided at once. Loading,
probing, hashing and disk work happen in threads, the first load of a new model in a process of its own. The old model
keeps answering until the new one has soaked.

A disk that takes no write changes nothing: a state that cannot be journalled is not entered (its event is tried again,
ever more slowly), only the model that is committed is brought into service all the same.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tuf.api.metadata import TargetFile

from edge_agent.conduct import complaint
from edge_agent.config import Home, Identity, Profile
from edge_agent.engines import Engine, Engines
from edge_agent.fetch import Progress
from edge_agent.hardware import check_suits, find_hardware
from edge_agent.journal import Journal
from edge_agent.runtimes.base import LanguageRuntime, TensorRuntime, load
from edge_agent.slots import Store, told_as_space
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
    Restarted,
    Restore,
    Restored,
    RestoreFailed,
    Retry,
    Slot,
    SlotState,
    Wanted,
    from_dict,
    step,
)
from edge_agent.thrift import trim
from edge_agent.trial import try_out
from edge_agent.verify import DeviceTrust, RefusedError, check_fresh, open_manifest, open_release
from model_registry.manifest import Manifest, ReleaseArtefact
from wire.errors import ForeshoreError, InsufficientSpaceError, TimedOutError
from wire.messages import Desired, ModelState, Phase

SOAK_STEP_S = 0.2
WINDOW_STEP_S = 30.0
MIN_JOURNAL_RETRY_S = 0.2
MAX_RETRY_S = 60.0


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
    troubled: Callable[[str, str | None], None]  # what keeps a model's shell from its work, or nothing any more
    held: Callable[[], set[str]]  # manifests that any state holds
    collecting: asyncio.Lock = field(default_factory=asyncio.Lock)  # a wish begins before or after, never during it


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
        self._notes: set[asyncio.Task[None]] = set()
        self._num_retries = 0

    async def handle(self, event: Event, *, tries: int = 0) -> None:
        """Decide, journal, act."""
        async with self._lock:
            after, actions = step(self.state, event)
            if after != self.state:
                try:
                    await asyncio.to_thread(self._journal.append, after.to_dict())
                except OSError as error:
                    await self._postpone(event, actions, error, tries)
                    return
                self.state = after
                self._device.changed(self.state.name, self.state)
            if tries:
                self._device.troubled(self.state.name, None)
            for action in actions:
                await self._act(action)
            if self.state.suspended and (isinstance(event, Restarted) or (isinstance(event, Retry) and not actions)):
                self._retry_later()

    async def close(self) -> None:
        """Stop the work under way; the journal remembers it."""
        for note in self._notes:
            note.cancel()
        await self._stop()

    async def _postpone(self, event: Event, actions: tuple[Action, ...], error: OSError, tries: int) -> None:
        """The journal takes no record: nothing changes, and what is committed runs all the same."""
        self._device.troubled(self.state.name, f"disk_failed: the journal takes no record: {error}")
        if isinstance(event, Restarted) and self.state.runnable is not None:
            await self._restore(
                self.state.runnable, is_careful=any(a.is_careful for a in actions if isinstance(a, Restore))
            )
        delay_s = min(MIN_JOURNAL_RETRY_S * 2**tries, MAX_RETRY_S)
        self._later(event, delay_s * random.uniform(0.5, 1), tries=min(tries + 1, 16))

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
            case Restore(slot=slot, is_careful=is_careful):
                await self._restore(slot, is_careful=is_careful)
            case Commit(slot=slot):
                self._commit(slot)
                await self._point(slot.manifest)
            case Collect():
                await self._collect()

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
            with told_as_space(0, self._device.home.store):
                async with asyncio.timeout(limit_s):
                    await work[phase](wanted)
        except TimeoutError:
            event = Failed(phase, ticket, TimedOutError.code, f"{phase} took more than {limit_s:g} s")
        except ForeshoreError as error:
            event = Failed(phase, ticket, error.code, str(error))
        except OSError as error:
            event = Failed(phase, ticket, "disk_failed", str(error))
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
        await self._collect()
        manifest = await self._manifest(wanted)
        check_suits(manifest, find_hardware(device.profile, device.home.store))
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
        """Try it in a process of its own, then load it beside the old model; in its place where memory is tight."""
        engines = self._device.engines
        manifest = self._device.store.get_manifest(wanted.manifest)
        replacing = None
        try:
            engines.check_fits(manifest)
        except InsufficientSpaceError:
            replacing = manifest.name
            engines.check_fits(manifest, replacing=replacing)
            self._retire(engines.route(manifest.name, None))
        measured_bytes = await self._try_out(wanted.slot, engines.free_bytes(replacing=replacing))
        self._candidate = await self._open(wanted.slot, measured_bytes)
        self._candidate.check_context()

    async def _try_out(self, slot: Slot, free_bytes: int) -> int:
        """Memory the model takes, measured where it can do no harm."""
        device = self._device
        return await try_out(
            device.store.manifest_file(slot.manifest),
            device.store.files(slot.manifest),
            device.profile,
            free_bytes=free_bytes,
            timeout_s=device.profile.probe_timeout_s,
        )

    async def _probe(self, wanted: Wanted) -> None:
        from edge_agent.probe import probe

        candidate = self._get_candidate()
        old = self._device.engines.find(self.state.name)
        async with asyncio.timeout(self._device.profile.probe_timeout_s):
            candidate.latency_ms = await asyncio.to_thread(
                probe,
                candidate.manifest,
                self._device.store.files(wanted.manifest),
                candidate.runtime,
                old=old.runtime if old else None,
                max_slowdown=self._device.profile.max_slowdown,
            )

    async def _switch(self, wanted: Wanted) -> None:
        self._device.engines.route(self.state.name, self._get_candidate())

    async def _soak(self, wanted: Wanted) -> None:
        """Watch real requests; the old version, still loaded, is the measure."""
        candidate = self._get_candidate()
        olds = [e for e in self._device.engines.loaded() if e.manifest.name == self.state.name and e is not candidate]
        old = next((engine for engine in olds if not engine.is_retired), None)
        until = time.monotonic() + wanted.soak_s
        while True:
            found = complaint(candidate.conduct, old.conduct if old else None, self._device.profile.max_slowdown)
            if found is not None:
                raise SoakFailedError(found, remedy="mend the model")
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, SOAK_STEP_S))

    async def _open(self, slot: Slot, measured_bytes: int = 0) -> Engine:
        store = self._device.store
        manifest = store.get_manifest(slot.manifest)
        runtime = await asyncio.to_thread(self._load_small, manifest, store.files(slot.manifest))
        engine = Engine(slot, manifest, runtime, measured_bytes)
        self._device.engines.add(engine)
        return engine

    def _load_small(self, manifest: Manifest, files: Path) -> TensorRuntime | LanguageRuntime:
        """Loading takes for a moment more than the model; that goes back to the system at once."""
        try:
            return load(manifest, files, self._device.profile)
        finally:
            trim()

    async def _restore(self, slot: Slot | None, *, is_careful: bool) -> None:
        """Let `slot` answer; a model that does not load is told to the state machine."""
        engines, name = self._device.engines, self.state.name
        if slot is None:
            self._replace(None)
            await self._point(None)
            return
        active = engines.find(name)
        if active is not None and active.slot.manifest == slot.manifest:
            return
        kept = next((e for e in engines.loaded() if e.slot == slot and not e.is_retired), None)
        try:
            if kept is None and is_careful:
                await self._try_out(slot, engines.free_bytes(replacing=name))
            self._replace(kept or await self._open(slot))
        except Exception as error:  # noqa: BLE001 - whatever keeps it from loading is reported as the result
            code = error.code if isinstance(error, ForeshoreError) else "load_failed"
            self._later(RestoreFailed(slot.manifest, code, str(error)))
            self._retry_later()
            return
        self._num_retries = 0
        await self._point(slot.manifest)
        self._later(Restored(slot.manifest))
        self._later(Healthy(), self._device.profile.healthy_after_s)

    def _retry_later(self) -> None:
        self._num_retries = min(self._num_retries + 1, 16)
        self._later(Retry(), min(self._device.profile.healthy_after_s * 2**self._num_retries, MAX_RETRY_S))

    def _replace(self, engine: Engine | None) -> None:
        before = self._device.engines.route(self.state.name, engine)
        if before is not None and before is not self._candidate:
            self._retire(before)

    async def _point(self, manifest: str | None) -> None:
        """The link is for people; the journal is what counts, so a failure here is only told."""
        try:
            await asyncio.to_thread(self._device.store.point, self.state.name, manifest)
        except OSError as error:
            self._device.troubled(self.state.name, f"disk_failed: the link to the current model: {error}")

    async def _collect(self) -> None:
        """Delete what no state holds; what cannot be deleted now goes the next time."""
        async with self._device.collecting:
            try:
                await asyncio.to_thread(self._device.store.collect, self._device.held())
            except OSError as error:
                self._device.troubled(self.state.name, f"disk_failed: old files stay for now: {error}")

    def _later(self, event: Event, delay_s: float = 0.0, *, tries: int = 0) -> None:
        async def say() -> None:
            await asyncio.sleep(delay_s)
            await self.handle(event, tries=tries)

        note = asyncio.create_task(say(), name=f"{self.state.name}-note")
        self._notes.add(note)
        note.add_done_callback(self._notes.discard)

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
