"""Kills a real agent, tears and fails its writes, at any system call from fetch to garbage collection, and looks.

Each life of the process gets a plan (see `failing_disk.c`) or is killed from outside after a random time; updates go on
all the while, one wish after another. After each death the disk must hold a whole committed model and nothing that
claims to be whole and is not; each life that lasts must answer with a version, and with that version's numbers.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from edge_agent.journal import Journal
from edge_agent.slots import places
from edge_agent.state import SlotState, from_dict
from model_registry.manifest import Manifest, parse_manifest, sha256
from tests.fakes.agent_plane import AgentProcess, Plane
from tests.faults.failing_disk import FailingDisk
from wire.messages import DesiredModel, Phase

PROFILE = """
name: test
targets: [cpu-x86]
memory_budget_bytes: 700000000
reconnect_max_s: 0.2
fetch_stall_s: 1
healthy_after_s: 0.2
"""
ANSWER_S = 120.0
UPDATE_S = 120.0  # of one undisturbed life
LIFE_S = 2.5  # of a process that is killed from outside
LONG_LIFE_S = 30.0  # of one whose plan never comes about
MEAN_CALLS = 60
PADDING_BYTES = 300_000
ERRORS = (5, 28)  # EIO, ENOSPC
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 1.0, 1.0, 1.0]}]}


@dataclass
class Figures:
    """What a run counted."""

    kills: int = 0
    torn_writes: int = 0  # power cuts in the middle of a call, and calls that failed
    states_without_model: int = 0
    wrong_digests: int = 0
    refetched_bytes_max: int = 0  # asked for again although it was on the disk when the process died
    stuck_updates: int = 0
    answers: int = 0
    results: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "results": dict(self.results), "faults": dict(self.faults)}


class CrashRun:
    """One device on its way through deaths and damages."""

    def __init__(self, folder: Path, seed: int, *, vision: list[Path] | None = None) -> None:
        self.figures = Figures()
        self._random = random.Random(seed)
        self._plane = Plane(folder / "plane")
        profile = folder / "profile.yaml"
        profile.write_text(PROFILE)
        self._agent = AgentProcess(folder / "home")
        self._agent.enrol(self._plane.url, str(profile))
        self._home = folder / "home"
        self._disk = FailingDisk(self._home, folder)
        self._scales = {f"{n}.0.0": float(n) for n in (2, 3, 4)}
        tiny = [self._plane.publish(scale, v, padding_bytes=PADDING_BYTES) for v, scale in self._scales.items()]
        self._tiny = itertools.cycle(tiny)
        self._vision = itertools.cycle(_publish_vision(self._plane, vision)) if vision else None
        self._large: DesiredModel | None = None
        self._num_wishes = 0
        self._has_committed = False
        self._ended_generation = 0
        self._wished_at = 0.0
        self._durable: tuple[str, set[int]] | None = None
        self._http = httpx.Client(timeout=5)

    def close(self) -> None:
        self._http.close()
        if self._agent.is_alive:
            self._agent.kill()
        self._plane.close()

    def run(self, kills: int, torn_writes: int, *, until_s: float = float("inf")) -> Figures:
        """Go on until both numbers are reached; at the end one update must succeed undisturbed."""
        self._live_whole()
        while time.monotonic() < until_s:
            wants_kills, wants_torn = self.figures.kills < kills, self.figures.torn_writes < torn_writes
            if not wants_kills and not wants_torn:
                break
            self._live(self._plan(wants_kills, wants_torn))
        self._live_whole()
        return self.figures

    def _plan(self, wants_kills: bool, wants_torn: bool) -> str:
        at = [1 + int(self._random.expovariate(1 / MEAN_CALLS)) for _ in range(4)]
        wants = [*(["k", "k", "a", "timed"] if wants_kills else []), *(["t", "f"] if wants_torn else [])]
        kind = self._random.choice(wants)
        if kind == "timed":
            return ""
        if kind == "f":
            numbers = list(itertools.accumulate(at))
            failing = [f"f{number}={self._random.choice(ERRORS)}" for number in numbers[:3]]
            return ",".join([*failing, f"k{numbers[3]}"])
        return f"{kind}{at[0]}"

    def _live_whole(self) -> None:
        """An undisturbed life: what was begun ends, one more update succeeds, and the process stops by itself."""
        self._agent.launch()
        assert self._agent.await_port(60)
        self._wished_at = time.monotonic()
        while self._num_wishes and not self._has_ended() and not self._is_stuck():
            time.sleep(0.05)
        before = self.figures.results["succeeded"]
        self._wish()
        while not self._has_ended() and not self._is_stuck():
            time.sleep(0.05)
        if self.figures.results["succeeded"] == before:
            self.figures.stuck_updates += 1
            self._find(f"the last update did not succeed: {self._plane.reported[-1:]}")
        self._answer()
        self._agent.stop()
        self._look("")

    def _live(self, plan: str) -> None:
        """One life of the process; ends with its death."""
        before_needs = len(self._plane.needs)
        self._agent.launch(self._disk.environment(plan) if plan else None)
        self._wished_at = time.monotonic()
        until = time.monotonic() + (LONG_LIFE_S if plan else self._random.uniform(0.2, LIFE_S))
        if self._agent.await_port(60):
            self._answer()
            while self._agent.is_alive and time.monotonic() < until:
                if self._has_ended() or self._is_stuck():
                    self._wish()
                time.sleep(0.02)
        if self._agent.is_alive:
            self._agent.kill()
            self.figures.kills += 1
        self._agent.await_death()
        for line in self._disk.told():
            kind, call, _ = line.split(" ", 2)
            self.figures.faults[f"{kind} {call}"] += 1
            self.figures.kills += kind == "kill"
            self.figures.torn_writes += kind in {"cut", "fail"}
        self._count_refetched(before_needs)
        self._look(plan)

    def _find(self, what: str) -> None:
        self.figures.findings.append(f"after {self.figures.kills} kills, {self.figures.torn_writes} torn: {what}")

    def _is_stuck(self) -> bool:
        if time.monotonic() - self._wished_at < UPDATE_S:
            return False
        self.figures.stuck_updates += 1
        self._find(f"an update does not end: {self._plane.reported[-1:]}")
        self._wished_at = time.monotonic()
        return True

    def _wish(self) -> None:
        self._num_wishes += 1
        if self._vision is not None and self._num_wishes % 20 == 0:
            self._large = next(self._vision)
        self._plane.wish(next(self._tiny), *([self._large] if self._large else []))
        self._wished_at = time.monotonic()
        self._durable = None

    def _has_ended(self) -> bool:
        """Whether the device has reported the end of what was last wished."""
        generation = self._plane.generation
        if self._ended_generation == generation:
            return True
        for document in reversed(self._plane.reported[-3:]):
            models = {model["name"]: model for model in document["models"]}
            names = ["tiny", *(["vision"] if self._large else [])]
            if document["generation"] == generation and all(models.get(name, {}).get("result") for name in names):
                self._ended_generation = generation
                self.figures.results[models["tiny"]["result"]] += 1
                self._has_committed = self._has_committed or "active_version" in models["tiny"]
                return True
        return False

    def _answer(self) -> None:
        """A version must answer, with its own numbers, unless none was ever committed or the process dies."""
        until = time.monotonic() + ANSWER_S
        while self._has_committed and self._agent.is_alive:
            try:
                answer = self._http.post(f"{self._agent.url}/v2/models/tiny/infer", json=BODY)
            except httpx.HTTPError:
                time.sleep(0.02)
                continue
            if answer.status_code == 200:
                self.figures.answers += 1
                document = answer.json()
                version = answer.headers["x-foreshore-model-version"]
                if document["outputs"][0]["data"][0] != self._scales[version]:
                    self.figures.wrong_digests += 1
                    self._find(f"version {version} answers {document['outputs'][0]['data'][0]}")
                return
            if time.monotonic() > until:
                self.figures.states_without_model += 1
                self._find(f"no version answers: {answer.text[:300]}; {self._state('tiny')}")
                return
            time.sleep(0.05)

    def _state(self, name: str) -> SlotState | None:
        last = Journal(self._home / "state" / f"{name}.journal").last
        return from_dict(last) if last else None

    def _look(self, plan: str) -> None:
        """What lies on the disk after a death."""
        store = self._home / "store"
        whole = {}
        for folder in (store / "artefacts").iterdir():
            if (folder / "manifest.json").exists():
                whole[folder.name] = is_whole(folder)
                if not whole[folder.name]:
                    self.figures.wrong_digests += 1
                    self._find(f"plan {plan}: artefact {folder.name[:12]} claims to be whole")
        state = self._state("tiny")
        if self._has_committed and (state is None or state.committed is None):
            self.figures.states_without_model += 1
            self._find(f"plan {plan}: the journal names no model: {state}")
        for slot in (state.committed, state.previous) if state else ():
            if slot is not None and not whole.get(slot.manifest, False):
                self.figures.states_without_model += 1
                self._find(f"plan {plan}: slot {slot.version} is not whole on disk: {state}")
        self._durable = self._done(state) if state and state.wanted and state.is_working else None

    def _done(self, state: SlotState) -> tuple[str, set[int]] | None:
        """Chunks of the update under way that are verified and on disk; reading them changes nothing."""
        assert state.wanted is not None
        digest = state.wanted.manifest
        folder = self._home / "store" / "partial" / digest
        manifest = self._plane.manifests[digest]
        if state.phase not in {Phase.PREFLIGHT, Phase.FETCH} or not (folder / "done").exists():
            return None
        log = (folder / "done").read_bytes()
        recorded = {int.from_bytes(log[at : at + 4], "big") for at in range(0, len(log) // 4 * 4, 4)}
        data = {file.path: (folder / "files" / file.path).read_bytes() for file in manifest.files}
        found = set()
        for index, place in enumerate(places(manifest)):
            part = data[place.path][place.offset : place.offset + place.chunk.size_bytes]
            if index in recorded and sha256(part) == place.chunk.digest:
                found.add(index)
        return digest, found

    def _count_refetched(self, before_needs: int) -> None:
        if self._durable is None:
            return
        digest, done = self._durable
        need = next((n for n in self._plane.needs[before_needs:] if n.manifest == digest and n.missing), None)
        if need is None:
            return
        chunks = self._plane.manifests[digest].chunk_list()
        missing = {index for first, count in need.missing for index in range(first, first + count)}
        self.figures.refetched_bytes_max = max(
            self.figures.refetched_bytes_max, sum(chunks[index].size_bytes for index in missing & done)
        )


def is_whole(folder: Path) -> bool:
    """Whether every file of an artefact is what its manifest says."""
    manifest: Manifest = parse_manifest((folder / "manifest.json").read_bytes(), expected_digest=folder.name)
    return all(
        (folder / "files" / file.path).is_file() and sha256((folder / "files" / file.path).read_bytes()) == file.digest
        for file in manifest.files
    )


def _publish_vision(plane: Plane, paths: list[Path]) -> list[DesiredModel]:
    """Large real models, each with one golden case computed here."""
    import io

    import numpy as np
    import onnxruntime

    wishes = []
    for number, path in enumerate(paths, 1):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        spec = session.get_inputs()[0]
        shape = [length if isinstance(length, int) else 1 for length in spec.shape]
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        outputs = session.run(None, {spec.name: x})
        names = [output.name for output in session.get_outputs()]
        golden = io.BytesIO()
        arrays = {f"output.{name}": value for name, value in zip(names, outputs, strict=True)}
        np.savez(golden, **{f"input.{spec.name}": x, **arrays})
        contents = {"model.onnx": path.read_bytes(), "golden.npz": golden.getvalue()}
        wishes.append(plane.publish_tensor("vision", contents, f"{number}.0.0"))
    return wishes
