"""The main job from beginning to end, one step after another, each through a public door.

A step either returns what it found or raises; the story stops at the first that raises and the report says where.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud.demo.asks import chat, classify
from cloud.demo.platform import Platform
from cloud.demo.report import AnswerResult, Report, StepResult
from wire.errors import ForeshoreError, TimedOutError

ROLLOUT_TIMEOUT_S = 240.0
TARGETS = "cpu-x86,jetson-orin"
ALL_DEVICES = ("orin-1", "cpu-1", "cpu-2")
LANGUAGE_DEVICES = ("orin-1", "cpu-1")
ENDED = ("succeeded", "halted", "rolled_back")


@dataclass(frozen=True)
class Finding:
    """What a step found."""

    sentence: str
    num_bytes: int | None = None
    facts: Mapping[str, Any] | None = None


class Story:
    """Runs the steps on one platform and fills a report."""

    def __init__(self, platform: Platform, models: Path, photograph: Path, say: Callable[[str], None]) -> None:
        self.report = Report()
        self._platform = platform
        self._models = models
        self._photograph = photograph
        self._say = say
        self._vision: dict[str, Any] = {}
        self._language: dict[str, Any] = {}

    def run(self) -> Report:
        """Every step in order, until one fails."""
        steps: tuple[tuple[str, Callable[[], Finding]], ...] = (
            ("start everything", self._start),
            ("publish vision", self._publish_vision),
            ("publish language", self._publish_language),
            ("roll out vision", lambda: self._roll_out(self._vision, ALL_DEVICES)),
            ("roll out language", lambda: self._roll_out(self._language, LANGUAGE_DEVICES)),
            ("ask the devices", self._ask),
            ("refuse a bad update", self._refuse_bad_update),
            ("send a good update as a delta", self._send_delta),
        )
        for name, step in steps:
            self._say(f"==> {name}")
            begin = time.monotonic()
            try:
                finding = step()
            except (ForeshoreError, OSError, KeyError, ValueError) as error:
                self._record(name, begin, Finding(f"{type(error).__name__}: {error}"), ok=False)
                break
            self._record(name, begin, finding, ok=True)
        return self.report

    def _record(self, name: str, begin: float, finding: Finding, *, ok: bool) -> None:
        seconds = time.monotonic() - begin
        self._say(f"    {finding.sentence} ({seconds:.1f} s)")
        step = StepResult(name, ok, seconds, finding.sentence, finding.num_bytes, finding.facts or {})
        self.report.steps.append(step)

    def _start(self) -> Finding:
        self._platform.start()
        return Finding(f"pages at {self._platform.address('control')}/", facts=self._platform.state()["addresses"])

    def _publish_vision(self) -> Finding:
        self._vision = self._publish_classifier("mobilenet_v2.onnx")
        return _published(self._vision)

    def _publish_classifier(self, file: str) -> dict[str, Any]:
        vision, golden = self._models / "mobilenet_v2.vision.json", self._models / "mobilenet_v2.golden.npz"
        arguments = ["--name", "vision", "--targets", TARGETS, "--licence", "BSD-3-Clause"]
        return self._platform.publish(
            self._models / file, [*arguments, "--vision", str(vision), "--golden", str(golden)]
        )

    def _publish_language(self) -> Finding:
        arguments = ["--name", "smollm2", "--targets", TARGETS, "--licence", "Apache-2.0"]
        self._language = self._platform.publish(self._models / "smollm2-135m-instruct", arguments)
        return _published(self._language)

    def _roll_out(self, release: Mapping[str, Any], devices: tuple[str, ...]) -> Finding:
        rollout = self._follow_rollout(release, devices)
        if rollout["status"] != "succeeded":
            raise ForeshoreError(f"rollout ended as {rollout['status']}: {rollout.get('reason')}")
        return Finding(f"{release['name']} {release['version']} runs on {', '.join(devices)}", facts=rollout)

    def _follow_rollout(self, release: Mapping[str, Any], devices: tuple[str, ...]) -> dict[str, Any]:
        group = f"{release['name']}-devices"
        with self._platform.client() as client:
            if group not in {entry["name"] for entry in client.get("/groups")["items"]}:
                client.post("/groups", {"name": group, "device_ids": list(devices)})
            body = {"release": release["release"], "group": group, "waves": [{"count": 1}, {"percent": 100}]}
            body |= {"gate": {"max_failures": 0, "min_success_ratio": 1.0}, "soak_s": 1.0, "start": True}
            rollout = dict(client.post("/rollouts", body))
            deadline, shown = time.monotonic() + ROLLOUT_TIMEOUT_S, ""
            while rollout["status"] not in ENDED:
                if time.monotonic() > deadline:
                    raise TimedOutError(f"rollout {rollout['rollout_id']} is still {rollout['status']}")
                time.sleep(0.5)
                rollout = dict(client.get(f"/rollouts/{rollout['rollout_id']}"))
                line = _device_line(rollout)
                if line != shown:
                    self._say(f"    {line}")
                    shown = line
        return rollout

    def _ask(self) -> Finding:
        address = self._platform.address
        story = "You answer in one short sentence. " * 12
        answers = [
            *(classify(address(device), device, self._photograph) for device in ALL_DEVICES),
            chat(address("cpu-1"), "cpu-1", "chat on the device", "What is the capital of France?"),
            chat(address("cpu-2"), "cpu-2", "model does not fit", story + "What is the capital of France?"),
            chat(address("cpu-2"), "cpu-2", "same prefix again", story + "What is the capital of Italy?"),
            chat(address("cpu-1"), "cpu-1", "beyond the context", story * 12 + "What is a foreshore?"),
        ]
        self.report.answers.extend(answers)
        expected = ["device"] * 4 + ["cloud"] * 3
        wrong = [a.what for a, place in zip(answers, expected, strict=True) if a.location != place]
        if wrong:
            raise ForeshoreError(f"ran in the wrong place: {', '.join(wrong)}")
        return _reuse(answers[4], answers[5])

    def _refuse_bad_update(self) -> Finding:
        bad = self._publish_classifier("mobilenet_v2_bad.onnx")
        rollout = self._follow_rollout(bad, ALL_DEVICES)
        if rollout["status"] != "halted":
            raise ForeshoreError(f"the bad update was not halted: {rollout['status']}")
        again = [classify(self._platform.address(device), device, self._photograph) for device in ALL_DEVICES]
        before = {a.device_id: a.answer.split(" (")[0] for a in self.report.answers if a.what == self._photograph.name}
        changed = [a.device_id for a in again if a.answer.split(" (")[0] != before[a.device_id]]
        if changed:
            raise ForeshoreError(f"{', '.join(changed)} no longer answers as before")
        return Finding("the canary refused it, the rollout halted, every device serves the old version", facts=rollout)

    def _send_delta(self) -> Finding:
        tuned = self._publish_classifier("mobilenet_v2_tuned.onnx")
        finding = self._roll_out(tuned, ALL_DEVICES)
        whole = max(artefact["size_bytes"] for artefact in tuned["artefacts"])
        delta = [size for artefact in tuned["artefacts"] for size in artefact["deltas"].values()]
        if not delta:
            raise ForeshoreError("the update carries no delta")
        return Finding(f"{finding.sentence}; {max(delta):,} instead of {whole:,} bytes a device", max(delta))


def _published(result: Mapping[str, Any]) -> Finding:
    gates = sum(len(artefact["gates"]) for artefact in result["artefacts"])
    sentence = f"{result['name']} {result['version']}: {len(result['artefacts'])} artefacts, {gates} gates held"
    return Finding(sentence, result["uploaded_bytes"], result)


def _device_line(rollout: Mapping[str, Any]) -> str:
    devices = rollout.get("devices") or []
    return f"{rollout['status']}: " + ", ".join(f"{d['device_id']} {d['phase'] or d['state']}" for d in devices)


def _reuse(first: AnswerResult, second: AnswerResult) -> Finding:
    if second.cached_tokens <= first.cached_tokens:
        raise ForeshoreError("the second request with the same prefix reused no KV blocks")
    return Finding(
        f"{second.cached_tokens} prompt tokens reused; TTFT {first.ttft_ms or 0:.0f} -> {second.ttft_ms or 0:.0f} ms"
    )
