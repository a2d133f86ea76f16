"""The main job from beginning to end, one step after another, each through a public door.

A step either returns what it found or raises; the story stops at the first that raises and the report says where.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cloud.demo.asks import Asker, Chat
from cloud.demo.patience import WrongPlaceError
from cloud.demo.platform import Platform
from cloud.demo.report import AnswerResult, Report, StepResult
from cloud.demo.rollouts import Outcome, Rollouts
from wire.errors import ForeshoreError, UnavailableError

TARGETS = "cpu-x86,jetson-orin"
ALL_DEVICES = ("orin-1", "cpu-1", "cpu-2")
TOO_SMALL = ("cpu-2",)  # for the language model
LARGE_MODEL = "qwen2.5-coder-0.5b"
SYSTEM = "You answer in one short sentence and never make things up. "
PREFIX_TRIES = 3
QUEUE_WAIT_S = 60.0


@dataclass(frozen=True)
class Finding:
    """What a step found."""

    sentence: str
    num_bytes: int | None = None
    facts: Mapping[str, Any] | None = None


class Story:
    """Runs the steps on one platform and fills a report."""

    def __init__(
        self, platform: Platform, models: Path, photograph: Path, console: Console, *, has_large_model: bool
    ) -> None:
        self.report = Report()
        self._platform = platform
        self._models = models
        self._photograph = photograph
        self._console = console
        self._has_large_model = has_large_model
        self._ask = Asker(platform)
        self._rollouts = Rollouts(platform, console)
        self._vision: dict[str, Any] = {}
        self._language: dict[str, Any] = {}

    def run(self) -> Report:
        """Every step in order, until one fails."""
        steps: list[tuple[str, Callable[[], Finding]]] = [
            ("start everything", self._start),
            ("publish vision", self._publish_vision),
            ("publish language", self._publish_language),
            ("roll out vision", lambda: self._roll_out(self._vision)),
            ("roll out language", lambda: self._roll_out(self._language, TOO_SMALL)),
            ("answer on the device", self._answer_on_devices),
            ("offload what does not fit", self._offload),
            ("reuse a shared prefix", self._share_prefix),
        ]
        if self._has_large_model:
            steps.append(("answer with a cloud-only model", self._ask_large))
        steps += [
            ("refuse a bad update", self._refuse_bad_update),
            ("send a good update as a delta", self._send_delta),
        ]
        for name, step in steps:
            self._say(f"[bold]==> {name}[/bold]")
            begin = time.monotonic()
            try:
                finding = step()
            except (ForeshoreError, OSError, KeyError, ValueError) as error:
                self._record(name, begin, Finding(f"{type(error).__name__}: {error}"), ok=False)
                break
            self._record(name, begin, finding, ok=True)
        return self.report

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _record(self, name: str, begin: float, finding: Finding, *, ok: bool) -> None:
        seconds = time.monotonic() - begin
        self._console.print(f"    {finding.sentence} ({seconds:.1f} s)", highlight=False, soft_wrap=True, markup=False)
        step = StepResult(name, ok, seconds, finding.sentence, finding.num_bytes, finding.facts or {})
        self.report.steps.append(step)

    # publish

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

    # roll out

    def _roll_out(self, release: Mapping[str, Any], too_small: tuple[str, ...] = ()) -> Finding:
        outcome = self._succeed(release, too_small)
        return Finding(_runs(release, outcome), outcome.wire_bytes, {"rollout": outcome.rollout})

    def _succeed(self, release: Mapping[str, Any], too_small: tuple[str, ...] = ()) -> Outcome:
        """Roll out to all; every device must end with the release, but for those `too_small`, which are skipped."""
        outcome = self._rollouts.run(release, ALL_DEVICES)
        wanted = {device: "skipped" if device in too_small else "succeeded" for device in ALL_DEVICES}
        odd = [row for row in outcome.rows if row.state != wanted[row.device_id]]
        if outcome.status != "succeeded" or odd:
            why = "; ".join(f"{row.device_id} {row.state}: {row.reason}" for row in odd)
            raise ForeshoreError(f"rollout ended as {outcome.status}: {outcome.rollout.get('reason')} ({why})")
        return outcome

    # ask

    def _answer_on_devices(self) -> Finding:
        labels = [self._note(self._ask.classify(device, self._photograph)) for device in ALL_DEVICES]
        request = Chat("chat on the device", "cpu-1", "What is the capital of France?")
        answer = self._note(self._ask.chat(request, "device"))
        named = {label.answer.split(" (")[0] for label in labels}
        return Finding(f"{self._photograph.name} is {', '.join(sorted(named))}; chat says {answer.answer!r}")

    def _offload(self) -> Finding:
        story = SYSTEM * 12
        self._note(self._ask.chat(Chat("model does not fit", "cpu-2", "What is the capital of Spain?"), "cloud"))
        self._note(self._ask.chat(Chat("beyond the context", "cpu-1", story * 8 + "What is a foreshore?"), "cloud"))
        self._note(self._overflow_queue("cpu-1"))
        return Finding("too little memory, too long a prompt, too long a queue: each answered by the cloud")

    def _overflow_queue(self, device_id: str) -> AnswerResult:
        """Fill the device's queue with requests of its own, then send one more."""
        long = Chat("fills the queue", device_id, "Tell a long story about the sea.", max_tokens=96, prefer="device")
        last = Chat("beyond the queue", device_id, "What is the capital of Norway?")

        def attempt() -> AnswerResult:
            with ThreadPoolExecutor(max_workers=4) as pool:
                fillers = [pool.submit(self._ask.chat, long, "device")]
                self._await_queue(device_id, running=1, waiting=0)
                for waiting in (1, 2):
                    fillers.append(pool.submit(self._ask.chat, long, "device"))
                    self._await_queue(device_id, running=1, waiting=waiting)
                answer = self._ask.chat(last, "cloud")
                for filler in fillers:
                    filler.result()
            if "queue is full" not in answer.reason:
                raise WrongPlaceError(f"offloaded for another reason: {answer.reason}")
            return answer

        return self._platform.patiently(attempt)

    def _await_queue(self, device_id: str, *, running: int, waiting: int) -> None:
        deadline = time.monotonic() + QUEUE_WAIT_S
        while self._platform.patiently(lambda: self._ask.queue_lengths(device_id)) != (running, waiting):
            if time.monotonic() > deadline:
                raise UnavailableError(f"the queue of {device_id} did not fill")
            time.sleep(0.02)

    def _share_prefix(self) -> Finding:
        for number in range(PREFIX_TRIES):  # a worker killed between the two takes its cache along
            story = f"Conversation {number + 1}. " + SYSTEM * 24
            first = self._ask.chat(Chat("new prefix", "cpu-2", story + "What is the capital of France?"), "cloud")
            second = self._ask.chat(Chat("same prefix", "cpu-2", story + "What is the capital of Italy?"), "cloud")
            if second.cached_tokens > first.cached_tokens:
                break
        else:
            raise ForeshoreError("the second request with the same prefix reused no KV blocks")
        self._note(first)
        self._note(second)
        return Finding(
            f"{second.cached_tokens} of {second.prompt_tokens} prompt tokens reused; "
            f"TTFT {first.ttft_ms or 0:.0f} -> {second.ttft_ms or 0:.0f} ms",
            facts={"first_ttft_ms": first.ttft_ms, "second_ttft_ms": second.ttft_ms},
        )

    def _ask_large(self) -> Finding:
        request = Chat("cloud-only model", "orin-1", "Write a Python function that adds two numbers.", LARGE_MODEL, 48)
        answer = self._note(self._ask.chat(request, "cloud"))
        return Finding(f"{LARGE_MODEL} is on no device; the cloud answered {answer.answer[:60]!r}")

    def _note(self, answer: AnswerResult) -> AnswerResult:
        self.report.answers.append(answer)
        self._console.print(
            f"    {answer.what}: ran on the {answer.location} for {answer.device_id}. {answer.reason}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        return answer

    # update

    def _refuse_bad_update(self) -> Finding:
        bad = self._publish_classifier("mobilenet_v2_bad.onnx")
        outcome = self._rollouts.run(bad, ALL_DEVICES)
        if outcome.status != "halted":
            raise ForeshoreError(f"the bad update was not halted: {outcome.status}")
        before = {a.device_id: a.answer.split(" (")[0] for a in self.report.answers if a.what == self._photograph.name}
        again = [self._ask.classify(device, self._photograph) for device in ALL_DEVICES]
        changed = [a.device_id for a in again if a.answer.split(" (")[0] != before[a.device_id]]
        if changed:
            raise ForeshoreError(f"{', '.join(changed)} no longer answers as before")
        sentence = f"the canary refused it, every device serves the old version; {outcome.rollout['reason']}"
        return Finding(sentence, outcome.wire_bytes, {"rollout": outcome.rollout})

    def _send_delta(self) -> Finding:
        tuned = self._publish_classifier("mobilenet_v2_tuned.onnx")
        outcome = self._succeed(tuned)
        if not any(artefact["deltas"] for artefact in tuned["artefacts"]):
            raise ForeshoreError("the update carries no delta")
        whole = max(artefact["size_bytes"] for artefact in tuned["artefacts"])
        largest = max(row.wire_bytes for row in outcome.rows)
        return Finding(
            f"{_runs(tuned, outcome)}; at most {largest:,} of {whole:,} bytes to a device",
            outcome.wire_bytes,
            {"rollout": outcome.rollout, "whole_bytes": whole, "largest_bytes": largest},
        )


def _published(result: Mapping[str, Any]) -> Finding:
    gates = sum(len(artefact["gates"]) for artefact in result["artefacts"])
    sentence = f"{result['name']} {result['version']}: {len(result['artefacts'])} artefacts, {gates} gates held"
    return Finding(sentence, result["uploaded_bytes"], result)


def _runs(release: Mapping[str, Any], outcome: Outcome) -> str:
    runs = [row.device_id for row in outcome.rows if row.state == "succeeded"]
    skipped = "".join(f"; {row.device_id} skipped: {row.reason}" for row in outcome.rows if row.state == "skipped")
    return f"{release['name']} {release['version']} runs on {', '.join(runs)}{skipped}"
