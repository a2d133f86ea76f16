"""The whole platform on this machine, through its public doors: from publishing to an answer.

Starts what `scripts/demo` starts and measures with the real models:
- publish_to_serving_s: from the start of `foreshore publish` (MobileNetV2, two targets) to the last of three devices
  having committed; publish_to_serving_language_s: the same for SmolLM2-135M on the devices that can hold it
- wire_bytes_ratio: bytes that the devices received for the language model over the size of their artefacts
- local_*: chat on a device; offload_*: chat that its device sends to the cloud, with a prompt of its own each time
- offload_ttft_shared_prefix_ms: the same with a prompt whose beginning the cloud has seen
- agent_overhead_ms: an image tensor through the agent's Open Inference API, less the same runtime on the same file in
  this process (medians)
Times to first token are medians, speeds are tokens after the first over their time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import Goal
from cloud.demo.asks import Asker, Chat
from cloud.demo.platform import Platform
from cloud.demo.report import AnswerResult
from cloud.demo.rollouts import Outcome, Rollouts
from wire.errors import ForeshoreError

MODELS = Path(__file__).resolve().parent.parent / ".cache" / "models"
FLEET = ("orin-1", "cpu-1", "cpu-2")
TARGETS = "cpu-x86,jetson-orin"
SYSTEM = "You answer in one short sentence and never make things up. "
GOALS = [
    Goal("publish_to_serving_s", 60, "<="),
    Goal("wire_bytes_ratio", 1.02, "<="),
    Goal("shared_prefix_ttft_ratio", 0.5, "<="),
    Goal("agent_overhead_ms", 5, "<="),
]


def run(quick: bool) -> dict[str, float]:
    """Start, publish, roll out, ask; everything is stopped and removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="foreshore-e2e-") as folder:
        platform = Platform(Path(folder), [f"smollm2={MODELS / 'smollm2-135m-instruct'}"])
        try:
            platform.start()
            return _measure(platform, num_asks=3 if quick else 12)
        finally:
            platform.stop()


def _measure(platform: Platform, num_asks: int) -> dict[str, float]:
    rollouts, ask = Rollouts(platform, Console(stderr=True)), Asker(platform)
    vision, vision_s, _ = _serve(platform, rollouts, "mobilenet_v2.onnx", *_vision_arguments())
    language, language_s, outcome = _serve(platform, rollouts, "smollm2-135m-instruct", "--name", "smollm2")
    figures = {
        "publish_to_serving_s": vision_s,
        "publish_to_serving_language_s": language_s,
        "wire_bytes_ratio": _wire_ratio(language, outcome),
    }
    local = [ask.chat(Chat("local", "cpu-1", _question(n), prefer="device"), "device") for n in range(num_asks)]
    fresh, shared = [], []
    for number in range(num_asks):
        story = f"Conversation {number} of the benchmark. " + SYSTEM * 20
        fresh.append(ask.chat(Chat("offload", "cpu-2", story + _question(number)), "cloud"))
        shared.append(ask.chat(Chat("shared", "cpu-2", story + _question(number + 1)), "cloud"))
    figures |= {"local_ttft_ms": _ttft(local), "local_tok_s": _speed(local)}
    figures |= {"offload_ttft_ms": _ttft(fresh), "offload_tok_s": _speed(fresh)}
    figures["offload_ttft_shared_prefix_ms"] = _ttft(shared)
    figures["shared_prefix_ttft_ratio"] = _ttft(shared) / _ttft(fresh)
    figures["prefill_tokens_saved"] = float(statistics.median(answer.cached_tokens for answer in shared))
    manifest = next(one["manifest"] for one in vision["artefacts"] if one["target"] == "cpu-x86")
    model = platform.home / "devices" / "cpu-1" / "store" / "artefacts" / manifest / "files" / "model.onnx"
    return figures | _overhead(platform.address("cpu-1"), model, 40 if num_asks < 12 else 200)


def _serve(platform: Platform, rollouts: Rollouts, file: str, *arguments: str) -> tuple[dict[str, Any], float, Outcome]:
    """Publish and roll out; the release, the seconds and how the rollout ended."""
    begin = time.monotonic()
    release = platform.publish(MODELS / file, [*arguments, "--targets", TARGETS])
    outcome = rollouts.run(release, FLEET)
    if outcome.status != "succeeded":
        raise ForeshoreError(f"the rollout of {file} ended as {outcome.status}: {outcome.rollout.get('reason')}")
    return release, time.monotonic() - begin, outcome


def _vision_arguments() -> list[str]:
    vision, golden = MODELS / "mobilenet_v2.vision.json", MODELS / "mobilenet_v2.golden.npz"
    return ["--name", "vision", "--vision", str(vision), "--golden", str(golden)]


def _wire_ratio(release: Mapping[str, Any], outcome: Outcome) -> float:
    sizes = {artefact["target"]: artefact["size_bytes"] for artefact in release["artefacts"]}
    slots = {slot["device_id"]: slot for slot in outcome.rollout["devices"] if slot["state"] == "succeeded"}
    wire = sum(row.wire_bytes for row in outcome.rows if row.device_id in slots)
    return wire / sum(sizes[slot["target"]] for slot in slots.values())


def _overhead(url: str, model: Path, num_runs: int) -> dict[str, float]:
    """Medians of the same inference through the agent and in this process, in turn."""
    import httpx
    import numpy as np

    from edge_agent.runtimes.onnxruntime_tensor import OnnxRuntimeTensor

    runtime = OnnxRuntimeTensor(model, [], 1)
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    body, headers = _binary_request(runtime.inputs[0].name, image)
    bare, through = [], []
    with httpx.Client(base_url=url, timeout=30) as client:
        for number in range(num_runs + 5):
            begin = time.perf_counter()
            runtime.infer({runtime.inputs[0].name: image})
            middle = time.perf_counter()
            client.post("/v2/models/vision/infer", content=body, headers=headers).raise_for_status()
            if number >= 5:
                bare.append((middle - begin) * 1e3)
                through.append((time.perf_counter() - middle) * 1e3)
    runtime.close()
    return {
        "runtime_ms": statistics.median(bare),
        "agent_ms": statistics.median(through),
        "agent_overhead_ms": statistics.median(through) - statistics.median(bare),
    }


def _binary_request(name: str, image: Any) -> tuple[bytes, dict[str, str]]:
    """An Open Inference request with its tensor in the binary extension."""
    tensor = {"name": name, "datatype": "FP32", "shape": list(image.shape)}
    tensor["parameters"] = {"binary_data_size": image.nbytes}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + image.tobytes(), {"inference-header-content-length": str(len(head))}


def _question(number: int) -> str:
    places = ("France", "Spain", "Italy", "Norway", "Japan", "Egypt", "Chile", "Kenya", "India", "Peru", "Cuba", "Iran")
    return f"What is the capital of {places[number % len(places)]}? Say it and something about it."


def _ttft(answers: Sequence[AnswerResult]) -> float:
    return statistics.median(answer.ttft_ms for answer in answers if answer.ttft_ms is not None)


def _speed(answers: Sequence[AnswerResult]) -> float:
    return statistics.median(answer.tokens_per_s for answer in answers if answer.tokens_per_s is not None)
