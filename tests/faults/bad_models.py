"""Seeded bad models, properly published to a real agent that runs a good one: each must be caught, for its reason."""

from __future__ import annotations

import io
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from tests.fakes.agent_plane import AgentProcess, Plane

PROFILE = """
name: test
targets: [cpu-x86]
memory_budget_bytes: 150000000
reconnect_max_s: 0.2
fetch_stall_s: 2
healthy_after_s: 0.2
"""
ROWS, WIDTH, LAYERS = 32, 256, 30
SOAK_S = 2.0
LIVE_PEAK = 200.0  # in what applications send; golden inputs stay far below
Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bad:
    """A model that must not stay, and the code of the reason."""

    kind: str
    contents: dict[str, bytes]
    code: str
    memory_bytes: int = 1
    soak_s: float = 0.0


@dataclass
class Figures:
    """What a run counted."""

    num_models: int = 0
    num_caught: int = 0
    num_reason_right: int = 0
    results: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def weights(seed: int) -> Weights:
    """An orthogonal matrix: thirty of them in a row neither grow nor shrink a vector."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))
    return q.astype(np.float32)


def golden(w: Weights) -> bytes:
    """Three cases and what `model(w)` makes of them."""
    x = np.random.default_rng(7).standard_normal((3, ROWS, WIDTH)).astype(np.float32)
    y = x
    for _ in range(LAYERS):
        y = y @ w
    out = io.BytesIO()
    np.savez(out, **{"input.x": x, "output.y": y})
    return out.getvalue()


def model(w: Weights, *, idle_layers: int = 0, tail: Callable[[list[Any], list[Any]], None] | None = None) -> bytes:
    """y = x @ w @ w ...; `idle_layers` multiply by one; `tail` appends nodes and constants that make y of h."""
    nodes, at = [], "x"
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "one")]
    last = LAYERS + idle_layers - 1
    for layer in range(LAYERS + idle_layers):
        to = ("h" if tail else "y") if layer == last else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [at, "w" if layer < LAYERS else "one"], [to]))
        at = to
    if tail:
        tail(nodes, constants)
    shape = ["n", ROWS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


def bad_models(seed: int) -> list[Callable[[int], Bad]]:
    """One maker per kind; each takes the number of the model."""
    rng = random.Random(seed)

    def made(kind: str, code: str, onnx: bytes, w: Weights, **more: Any) -> Bad:
        return Bad(kind, {"model.onnx": onnx, "golden.npz": golden(w)}, code, **more)

    def nan(number: int) -> Bad:
        w = weights(number)
        spoilt = w.copy()
        spoilt[rng.randrange(WIDTH), rng.randrange(WIDTH)] = rng.choice([np.nan, np.inf, -np.inf])
        return made("nan", "not_finite", model(spoilt), w)

    def shape(number: int) -> Bad:
        def tail(nodes: list[Any], constants: list[Any]) -> None:
            if number % 2:
                nodes.append(helper.make_node("Transpose", ["h"], ["y"], perm=[0, 2, 1]))
            else:
                constants.append(numpy_helper.from_array(np.int64([rng.randrange(3)]), "axis"))
                nodes.append(helper.make_node("Unsqueeze", ["h", "axis"], ["y"]))

        w = weights(number)
        return made("shape", "wrong_shape", model(w, tail=tail), w)

    def slow(number: int) -> Bad:
        w = weights(number)
        return made("slow", "too_slow", model(w, idle_layers=LAYERS * rng.randint(2, 4)), w)

    def unreadable(number: int) -> Bad:
        w = weights(number)
        whole = model(w)
        return made("unreadable", "unsupported_model", whole[: rng.randrange(100, len(whole) // 2)], w)

    def abort(number: int) -> Bad:
        def tail(nodes: list[Any], constants: list[Any]) -> None:
            """The least integer divided by -1: the processor stops the process while constants are folded."""
            constants.append(numpy_helper.from_array(np.int32([-(2**31)]), "least"))
            constants.append(numpy_helper.from_array(np.int32([-1]), "minus"))
            nodes.append(helper.make_node("Div", ["least", "minus"], ["quotient"]))
            nodes.append(helper.make_node("Cast", ["quotient"], ["scale"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", ["h", "scale"], ["y"]))

        w = weights(number)
        return made("abort", "crashed", model(w, tail=tail), w)

    def inaccurate(number: int) -> Bad:
        w = weights(number)
        noise = np.random.default_rng(number).standard_normal(w.shape).astype(np.float32)
        return made("inaccurate", "inaccurate", model(w + np.float32(rng.uniform(0.01, 0.05)) * noise), w)

    def memory(number: int) -> Bad:
        w = weights(number)
        if number % 2:
            return made("memory", "insufficient_space", model(w), w, memory_bytes=rng.randrange(200, 4000) << 20)
        num_floats = rng.randrange(60, 120) << 20

        def tail(nodes: list[Any], constants: list[Any]) -> None:
            """States one byte and takes hundreds of megabytes."""
            constants.append(numpy_helper.from_array(np.int64([num_floats]), "size"))
            nodes.append(helper.make_node("ConstantOfShape", ["size"], ["large"]))
            nodes.append(helper.make_node("ReduceSum", ["large"], ["nothing"], keepdims=0))
            nodes.append(helper.make_node("Add", ["h", "nothing"], ["y"]))

        return made("memory", "insufficient_space", model(w, tail=tail), w)

    def live(number: int) -> Bad:
        def tail(nodes: list[Any], constants: list[Any]) -> None:
            """NaN only for inputs larger than any golden one: sqrt(50 - max(x))."""
            constants.append(numpy_helper.from_array(np.float32(50), "fifty"))
            constants.append(numpy_helper.from_array(np.float32(0), "naught"))
            nodes.append(helper.make_node("ReduceMax", ["x"], ["peak"], keepdims=0))
            nodes.append(helper.make_node("Sub", ["fifty", "peak"], ["rest"]))
            nodes.append(helper.make_node("Sqrt", ["rest"], ["root"]))
            nodes.append(helper.make_node("Mul", ["root", "naught"], ["nothing"]))
            nodes.append(helper.make_node("Add", ["h", "nothing"], ["y"]))

        w = weights(number)
        return made("live", "soak_failed", model(w, tail=tail), w, soak_s=SOAK_S)

    return [nan, shape, slow, unreadable, abort, inaccurate, memory, live]


class BadModelRun:
    """A device that runs a good model and is sent bad ones."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.figures = Figures()
        self._makers = bad_models(seed)
        self._plane = Plane(folder / "plane")
        profile = folder / "profile.yaml"
        profile.write_text(PROFILE)
        self._agent = AgentProcess(folder / "home")
        self._agent.enrol(self._plane.url, str(profile))
        self._agent.start()
        self._good = weights(10**6)
        contents = {"model.onnx": model(self._good), "golden.npz": golden(self._good)}
        self._plane.wish(self._plane.publish_tensor("chain", contents, "1.0.0"))
        self._plane.await_model(lambda m: m.get("result") == "succeeded", name="chain")
        self._ended = threading.Event()
        self._client = threading.Thread(target=self._ask_for_ever, daemon=True)
        self._client.start()

    def close(self) -> None:
        self._ended.set()
        self._client.join(30)
        self._agent.stop()
        self._plane.close()

    def run(self, num_models: int) -> Figures:
        """One after another, all kinds in turn."""
        for number, maker in zip(range(num_models), itertools.cycle(self._makers), strict=False):
            self._try(number, maker(number))
        return self.figures

    def _try(self, number: int, bad: Bad) -> None:
        wanted = self._plane.publish_tensor("chain", bad.contents, f"9.0.{number}", memory=bad.memory_bytes)
        pid = self._agent.pid
        self._plane.wish(wanted.model_copy(update={"soak_s": bad.soak_s}))
        ended = self._plane.await_model(lambda m: m.get("result") is not None, 90, name="chain")
        code = (ended.get("reason") or "").split(":")[0]
        is_caught = ended["result"] in {"failed_no_change", "rejected", "rolled_back"}
        is_caught = is_caught and ended["active_version"] == "1.0.0" and self._agent.is_alive and self._agent.pid == pid
        self.figures.num_models += 1
        self.figures.num_caught += is_caught
        self.figures.num_reason_right += is_caught and code == bad.code
        self.figures.results[f"{bad.kind}: {ended['result']} {code}"] += 1
        if not is_caught or code != bad.code:
            self.figures.findings.append(f"{number} {bad.kind}: {ended}")

    def _ask_for_ever(self) -> None:
        """An application whose inputs are larger than the golden ones."""
        x = np.full((1, ROWS, WIDTH), LIVE_PEAK, np.float32)
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.reshape(-1).tolist()}]}
        with httpx.Client(timeout=10) as client:
            while not self._ended.wait(0.25):
                try:
                    client.post(f"{self._agent.url}/v2/models/chain/infer", json=body)
                except httpx.HTTPError:
                    continue
