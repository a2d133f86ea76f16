"""A device's part in engines: it uses what was built for its hardware key, proves it, and builds when it has time.

The portable artefact answers from the first moment and again whenever an engine does not: every step here happens
beside it, and a failure is a note in the report and an alarm, never an interruption. An engine is opened only after its
document's digest was found in a publisher's list, the document names this tenant, the artefact that was assigned and
this very hardware key, every compatibility rule lets it through, and its bytes hash to the document. The first opening
is in a process of its own, with all golden inputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tuf.api.exceptions import LengthOrHashMismatchError

from edge_agent.build_conditions import Conditions, reason_not_to_build
from edge_agent.climate import read_climate
from edge_agent.config import EngineSettings
from edge_agent.engine_runtime import EngineRuntime, open_engine
from edge_agent.engine_shelf import EngineShelf
from edge_agent.engines import Engine
from edge_agent.hardware import UnsuitableError, find_hardware
from edge_agent.runtimes.base import TensorRuntime, load
from edge_agent.trial import TrialFailedError, try_out
from edge_agent.updates import Device, Update
from edge_agent.verify import RefusedError
from model_registry.compatibility import EngineFacts, facts_of, key_of, resolve_engine
from model_registry.compatibility.hardware_key import parse_key
from model_registry.engine_faults import ENGINE_FAULTS
from model_registry.manifest import EngineBuild, parse_engine_build, sha256
from wire.errors import ForeshoreError, IntegrityError, NotFoundError, TimedOutError, UnavailableError
from wire.messages import ModelState
from wire.tether import tethered

if TYPE_CHECKING:
    from model_registry.client import ControlClient, EngineLease, EngineOffer

BUILD_LOOK_S = 0.2
MAX_OUTPUT_CHARS = 1000


class EngineBuildError(ForeshoreError):
    """The builder's command made no engine."""

    code = "engine_build_failed"


class EngineWork:
    """The loop of one device. `connect` opens a connection to the control plane with the device's certificate."""

    def __init__(
        self,
        device: Device,
        settings: EngineSettings,
        connect: Callable[[], ControlClient],
        *,
        updates: Callable[[], dict[str, Update]],
        is_online: Callable[[], bool],
        alarm: Callable[[str, str], None],
    ) -> None:
        self._device, self._settings, self._connect = device, settings, connect
        self._updates, self._is_online, self._alarm = updates, is_online, alarm
        self._shelf = EngineShelf(device.home.store / "engines")
        self._notes: dict[str, tuple[str, str]] = {}  # by model: the artefact, and what there is to say
        self._documents: dict[str, EngineBuild] = {}  # by model: the engine that answers
        self._loop: asyncio.AbstractEventLoop | None = None

    def described(self, state: ModelState) -> ModelState:
        """A model's report with what is known of its engine."""
        built, (manifest, note) = self._documents.get(state.name), self._notes.get(state.name, ("", ""))
        is_of_engine = built is not None and built.manifest == state.active_manifest
        return state.model_copy(
            update={
                "engine": built.engine if built is not None and is_of_engine else None,
                "engine_note": note if manifest == state.active_manifest else None,
            }
        )

    async def run(self) -> None:
        """Look after engines until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            for name in sorted(self._device.engines.active()):
                try:
                    await self._use(name)
                except Exception as error:  # noqa: BLE001 - top of the task: told, and tried again the next time
                    self._alarm(name, f"engine: {type(error).__name__}: {error}")
            if self._why_not_build() is None:
                await self._build_one()
            await asyncio.sleep(self._settings.poll_s)

    # using

    async def _use(self, name: str) -> None:
        """Bring the model's engine into service, if there is one and none is in use."""
        active = self._device.engines.find(name)
        update = self._updates().get(name)
        if active is None or active.manifest.kind != "tensor" or update is None or update.state.is_working:
            return
        if isinstance(active.runtime, EngineRuntime):
            return
        self._documents.pop(name, None)
        offer, built = None, None
        try:
            built = self._shelf.find(active.slot.manifest, self._key())
            if built is None:
                offer = await self._ask(active.slot.manifest)
                if offer is None:
                    return
                built = await self._proven(offer, active)
            async with self._keeping(offer):
                await self._fetch(built)
                measured_bytes = await self._try(built, active)
            await self._tell(offer, None)
            await self._take_over(name, active, built, measured_bytes)
        except (UnavailableError, NotFoundError):
            return  # asked again the next time; what runs goes on
        except ForeshoreError as error:
            if built is not None and error.code in ENGINE_FAULTS:
                self._shelf.refuse(built.digest, f"{error.code}: {error}")
            await self._tell(offer, error)
            self._note(name, active.slot.manifest, f"{error.code}: {error}")

    async def _ask(self, manifest: str) -> EngineOffer | None:
        if not self._is_online():
            return None

        def ask() -> EngineOffer | None:
            with self._connect() as control:
                return control.find_engine(manifest)

        offer = await asyncio.to_thread(ask)
        if offer is not None and offer.lease_id is None and self._shelf.refusal(sha256(offer.document)) is not None:
            return None
        return offer

    async def _proven(self, offer: EngineOffer, active: Engine) -> EngineBuild:
        """The document of an offer, listed by a publisher and for this device; kept on the shelf."""
        digest, name = sha256(offer.document), active.manifest.name
        listed = await asyncio.to_thread(self._device.trust.find_release, name, digest)
        try:
            listed.verify_length_and_hashes(offer.document)
        except LengthOrHashMismatchError as error:
            raise IntegrityError(f"the engine's document is not as listed: {error}", remedy="ask again") from error
        built = parse_engine_build(offer.document, expected_digest=digest)
        wanted = (self._device.identity.tenant, name, active.slot.manifest, self._key())
        said = (built.tenant, built.name, built.manifest, built.hardware_key)
        if said != wanted:
            raise RefusedError(f"the engine is for {'/'.join(said)}", remedy=f"wanted {'/'.join(wanted)}")
        self._check_suits(built, active)
        self._shelf.accept(built)
        return built

    async def _fetch(self, built: EngineBuild) -> None:
        path = self._shelf.path(built.digest)

        def fetch() -> None:
            with self._connect() as control:
                control.download_blob(built.engine, path, max_bytes=built.size_bytes)

        if not path.exists():
            await asyncio.to_thread(fetch)

    @asynccontextmanager
    async def _keeping(self, offer: EngineOffer | None) -> AsyncIterator[None]:
        """Keep the lease of who is to prove an engine."""
        if offer is None or offer.lease_id is None:
            yield
            return
        from model_registry.engine_builder import keeping

        with self._connect() as control:
            kept = keeping(control, offer.build_id, offer.lease_id, offer.lease_s, threading.Event())
            await asyncio.to_thread(kept.__enter__)
            try:
                yield
            finally:
                await asyncio.to_thread(kept.__exit__, None, None, None)

    def _check_suits(self, built: EngineBuild, active: Engine) -> None:
        key = parse_key(built.hardware_key)
        assert key is not None, "it is this device's own"
        facts = EngineFacts(key.builder, key.version, (key.compute_capability,), key.jetpack, key.architecture)
        hardware = find_hardware(self._device.profile, self._device.home.store)
        verdict = resolve_engine(facts_of(active.manifest), facts, hardware)
        if not verdict.will_run:
            raise UnsuitableError(f"the engine {verdict.sentence}", remedy="it is built again", rule=verdict.rule)

    async def _try(self, built: EngineBuild, active: Engine) -> int:
        """Memory it takes, after every golden case held in a process of its own."""
        path = await asyncio.to_thread(self._shelf.check, built)
        return await self._try_file(path, active.slot.manifest)

    async def _try_file(self, path: Path, manifest: str) -> int:
        device = self._device
        return await try_out(
            device.store.manifest_file(manifest),
            device.store.files(manifest),
            device.profile,
            free_bytes=device.engines.free_bytes(),
            timeout_s=device.profile.probe_timeout_s,
            engine=path,
        )

    async def _take_over(self, name: str, active: Engine, built: EngineBuild, measured_bytes: int) -> None:
        """Let the engine answer in the place of the portable artefact, which is freed when its last request left."""
        device, manifest = self._device, active.manifest
        files = device.store.files(active.slot.manifest)

        def open_portable() -> TensorRuntime:
            return cast(TensorRuntime, load(manifest, files, device.profile))

        def fell(reason: str) -> None:
            self._shelf.refuse(built.digest, reason)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._fallen, name, built.manifest, reason)

        opened = await asyncio.to_thread(open_engine, self._settings, self._shelf.path(built.digest))
        runtime = EngineRuntime(opened, open_portable, fell)
        if device.engines.find(name) is not active:  # an update was faster
            await asyncio.to_thread(runtime.close)
            return
        engine = Engine(active.slot, manifest, runtime, measured_bytes, active.latency_ms)
        device.engines.add(engine)
        device.engines.route(name, engine)
        device.engines.retire(active)
        self._documents[name] = built
        self._notes.pop(name, None)
        self._changed(name)
        await asyncio.to_thread(self._shelf.keep, {e.slot.manifest for e in device.engines.loaded()} | device.held())

    def _fallen(self, name: str, manifest: str, reason: str) -> None:
        self._documents.pop(name, None)
        self._note(name, manifest, reason)

    async def _tell(self, offer: EngineOffer | None, error: ForeshoreError | None) -> None:
        """Answer the control plane that had this device prove an engine."""
        if offer is None or offer.lease_id is None:
            return

        def tell() -> None:
            with self._connect() as control, contextlib.suppress(ForeshoreError):
                control.prove_engine(offer, error.code if error else None, str(error) if error else "")

        await asyncio.to_thread(tell)

    # building

    def _why_not_build(self) -> str | None:
        return reason_not_to_build(
            Conditions(
                idle_s=self._device.engines.idle_s,
                is_updating=any(update.state.is_working for update in self._updates().values()),
                is_online=self._is_online(),
                power_w=read_climate().power_w if self._settings.max_power_w is not None else None,
            ),
            self._settings,
        )

    async def _build_one(self) -> None:
        from model_registry.engine_builder import EngineBuilder

        loop = asyncio.get_running_loop()

        def build(lease: EngineLease, engine: Path, going_on: Callable[[], None]) -> None:
            self._run_builder(lease, engine, going_on)
            checking = asyncio.run_coroutine_threadsafe(self._try_file(engine, lease.manifest), loop)
            try:
                checking.result(self._settings.build_timeout_s)
            except TrialFailedError as error:
                raise TrialFailedError("corrupt_engine", f"{error.code}: {error}") from error

        def work() -> None:
            with self._connect() as control:
                builder = EngineBuilder(control, build, self._device.home.store / "building", wants=self._why_not_build)
                outcome = builder.work_once()
            if outcome is not None and outcome.error is not None:
                sentence = f"{outcome.error.code}: {outcome.error}"
                lease = outcome.lease
                loop.call_soon_threadsafe(self._note, lease.model, lease.manifest, f"build of an engine: {sentence}")

        with contextlib.suppress(ForeshoreError):  # not reachable, or refused: asked again the next time
            await asyncio.to_thread(work)

    def _run_builder(self, lease: EngineLease, engine: Path, going_on: Callable[[], None]) -> None:
        """Run the builder's command on the portable graph, until it ends or is to stop."""
        if lease.hardware_key != self._key():
            raise RefusedError(f"the lease is for {lease.hardware_key}", remedy=f"this device is {self._key()}")
        manifest = self._device.store.get_manifest(lease.manifest)
        places = {"graph": self._device.store.files(lease.manifest) / manifest.entry, "engine": engine}
        wanted = ["nice", "-n", "10", *(part.format(**places) for part in self._settings.build or [])]
        command = tethered(wanted, signal.SIGKILL)
        until = time.monotonic() + self._settings.build_timeout_s
        with (
            tempfile.TemporaryFile() as output,
            subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as run,
        ):
            try:
                while run.poll() is None:
                    going_on()
                    if time.monotonic() > until:
                        raise TimedOutError("the builder takes too long", remedy="raise build_timeout_s")
                    time.sleep(BUILD_LOOK_S)
            finally:
                _end(run)
            output.seek(0, os.SEEK_END)
            output.seek(max(0, output.tell() - MAX_OUTPUT_CHARS))
            said = output.read().decode(errors="replace")
        if run.returncode != 0 or not engine.is_file() or engine.stat().st_size == 0:
            raise EngineBuildError(f"the builder ended with {run.returncode}: {said}", remedy="see its output")

    # telling

    def _key(self) -> str:
        key = key_of(find_hardware(self._device.profile, self._device.home.store))
        if key is None:
            raise NotFoundError("this device has no hardware key", remedy="state compute_capability in the profile")
        return str(key)

    def _note(self, name: str, manifest: str, note: str) -> None:
        if self._notes.get(name) != (manifest, note[:2000]):
            self._notes[name] = (manifest, note[:2000])
            self._alarm(name, note[:2000])
            self._changed(name)

    def _changed(self, name: str) -> None:
        update = self._updates().get(name)
        if update is not None:
            self._device.changed(name, update.state)


def _end(run: subprocess.Popen[bytes]) -> None:
    """End the builder and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
