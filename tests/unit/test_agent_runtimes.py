"""The parts of the agent's runtimes that need no model: rows of a batch, sampling, stop strings, lanes, cache rows."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.runtimes.base import Sampling
from edge_agent.runtimes.batch import Batch
from edge_agent.runtimes.kv_rows import KvRows, KvShape
from edge_agent.runtimes.onnxruntime_tensor import OnnxRuntimeTensor
from edge_agent.runtimes.providers import cache_settings
from edge_agent.runtimes.sampler import Sampler
from edge_agent.runtimes.stop_text import StopText
from edge_agent.runtimes.tensor_lanes import TensorLanes
from tests.fakes.compiler_models import write_classifier
from wire.errors import InvalidInputError, UnsupportedModelError


@given(st.lists(st.tuples(st.sampled_from(["join", "promote", "leave"]), st.integers(0, 9)), max_size=60))
def test_every_stream_keeps_its_own_row_whatever_joins_and_leaves(steps: list[tuple[str, int]]) -> None:
    batch: Batch[str] = Batch(4)
    owner_by_row: dict[int, str] = {}
    for number, (step, pick) in enumerate(steps):
        if step == "join" and batch.has_room:
            owner_by_row[batch.join(f"stream {number}")] = f"stream {number}"
        elif step == "promote" and batch.prefilling is not None:
            batch.promote()
        elif step == "leave" and owner_by_row:
            streams = [*batch.decoding, *([batch.prefilling] if batch.prefilling else [])]
            gone = streams[pick % len(streams)]
            del owner_by_row[batch.row(gone)]
            moves, free_row = batch.leave(gone)
            for move in moves:
                assert move.target not in owner_by_row
                owner_by_row[move.target] = owner_by_row.pop(move.source)
            assert free_row not in owner_by_row
        streams = [*batch.decoding, *([batch.prefilling] if batch.prefilling else [])]
        assert owner_by_row == dict(enumerate(streams))


def test_a_moved_row_holds_what_it_held_and_a_freed_one_nothing() -> None:
    rows = KvRows(["k", "v"], KvShape(2, 16, "float32"), num_rows=3, context_tokens=100)
    array = rows.array("k")
    array[2, :, :7] = np.arange(2 * 7 * 16).reshape(2, 7, 16)
    rows.move(2, 0, 7)
    assert np.array_equal(array[0, :, :7], np.arange(2 * 7 * 16).reshape(2, 7, 16))
    assert not array[2].any()
    assert rows.pointer("k", 1) - rows.pointer("k", 0) == array[0].nbytes


def test_sampling_keeps_to_its_limits_and_repeats_itself_under_a_seed() -> None:
    logits = np.asarray([0.0, 5.0, 4.9, 4.8, -3.0, 1.0], np.float32)
    assert Sampler(Sampling(8), []).pick(logits) == 1

    def draw(**options: float | int) -> set[int]:
        sampler = Sampler(Sampling(8, temperature=1.5, seed=3, **options), [])  # type: ignore[arg-type]
        return {sampler.pick(logits) for _ in range(400)}

    assert draw(top_k=2) == {1, 2}
    assert draw(top_p=0.75) <= {1, 2, 3}
    assert draw() >= {0, 1, 2, 3, 5}
    one, two = (Sampler(Sampling(8, temperature=1.0, seed=5), []) for _ in range(2))
    assert [one.pick(logits) for _ in range(20)] == [two.pick(logits) for _ in range(20)]


def test_shares_of_draws_follow_the_softmax() -> None:
    logits = np.log(np.asarray([0.6, 0.3, 0.1], np.float32))
    sampler = Sampler(Sampling(8, temperature=1.0, seed=0), [])
    counts = np.bincount([sampler.pick(logits) for _ in range(4000)], minlength=3) / 4000
    assert np.abs(counts - [0.6, 0.3, 0.1]).max() < 0.03  # 3.9 standard deviations of the largest


def test_what_was_said_is_penalised() -> None:
    logits = np.asarray([2.0, 1.9, -1.0], np.float32)
    sampler = Sampler(Sampling(8, repetition_penalty=1.5), [2])
    assert [sampler.pick(logits) for _ in range(2)] == [0, 1]


@given(st.lists(st.text("abc", max_size=3), max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(parts: list[str], stops: list[str]) -> None:
    whole, out, text = "".join(parts), "", StopText(stops)
    for part in parts:
        out += text.push(part)
        if text.is_stopped:
            break
    cut = min((at for at in (whole.find(stop) for stop in stops) if at >= 0), default=-1)
    if cut < 0:
        assert out + text.flush() == whole
    else:
        assert text.is_stopped
        assert not any(stop in out for stop in stops)
        assert whole.startswith(out)


def test_requests_that_wait_together_run_together_and_each_gets_its_own_rows() -> None:
    first_runs, go_on, sizes = threading.Event(), threading.Event(), []

    def run(lane: int, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sizes.append(len(inputs["x"]))
        first_runs.set()
        go_on.wait(30)
        return {"y": inputs["x"] * 2}

    lanes = TensorLanes(run, num_lanes=1, max_batch=8)  # type: ignore[arg-type]
    answers: dict[int, np.ndarray] = {}

    def ask(number: int, width: int = 1) -> None:
        answers[number] = lanes.infer({"x": np.full((1, width), number, np.float32)})["y"]

    threads = [threading.Thread(target=ask, args=(0,))]
    threads[0].start()
    first_runs.wait(30)
    threads += [threading.Thread(target=ask, args=(number,)) for number in range(1, 6)]
    threads.append(threading.Thread(target=ask, args=(6, 3)))  # of another shape: joins nobody
    for thread in threads[1:]:
        thread.start()
    while lanes.num_waiting < 6:
        threading.Event().wait(0.01)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert sorted(sizes) == [1, 1, 5]
    assert all(np.array_equal(answers[n], np.full((1, 3 if n == 6 else 1), 2.0 * n)) for n in range(7))


def test_a_failed_run_is_raised_to_every_request_in_it() -> None:
    def run(lane: int, inputs: object) -> dict[str, np.ndarray]:
        raise RuntimeError("out of memory")

    lanes = TensorLanes(run, num_lanes=1, max_batch=8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            lanes.infer({"x": np.zeros((1, 1), np.float32)})


def test_a_provider_is_taken_for_what_it_does_not_for_what_is_advertised(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "model.onnx")
    advertised = [name for name in onnxruntime.get_available_providers() if name != "CPUExecutionProvider"]
    wanted = ["TensorrtExecutionProvider", *advertised, "NoSuchExecutionProvider"]
    runtime = OnnxRuntimeTensor(path, wanted, 1, hardware_key="test key/1")
    reasons = {one.name: one.reason for one in runtime.tried if not one.is_accepted}
    assert reasons["NoSuchExecutionProvider"] == "not part of this build of ONNX Runtime"
    if "AzureExecutionProvider" in advertised:  # a session has it and gives it nothing
        assert reasons["AzureExecutionProvider"] == "no node of the graph is given to it"
    assert runtime.providers[-1] == "CPUExecutionProvider"
    assert runtime.tried[-1].reason == "loads and runs"


def test_batching_is_used_where_a_run_of_two_rows_gives_what_two_runs_give(tmp_path: Path) -> None:
    runtime = OnnxRuntimeTensor(write_classifier(tmp_path / "model.onnx"), [], 1)
    spec = runtime.inputs[0]
    assert runtime.is_batched == (spec.shape[0] == -1)
    shape = (3 if runtime.is_batched else 1, *spec.shape[1:])
    values = np.random.default_rng(0).random(shape).astype(np.float32)
    first = runtime.infer({spec.name: values})
    again = runtime.infer({spec.name: values})
    name = runtime.outputs[0].name
    assert np.array_equal(first[name], again[name])
    assert first[name] is not again[name]
    assert runtime.memory().cache_bytes >= first[name].nbytes
    with pytest.raises(InvalidInputError):
        runtime.infer({spec.name: values.astype(np.float64)})


def test_engines_of_another_kind_of_device_lie_elsewhere(tmp_path: Path) -> None:
    here, there = (cache_settings(tmp_path, key)["TensorrtExecutionProvider"] for key in ("orin/jp6.2", "orin/jp7"))
    assert here["trt_engine_cache_path"] != there["trt_engine_cache_path"]
    assert all(path.parent == tmp_path for path in map(Path, (here["trt_engine_cache_path"],)))


def test_a_file_that_is_no_graph_is_refused_with_every_reason(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UnsupportedModelError, match="CPUExecutionProvider: "):
        OnnxRuntimeTensor(tmp_path / "model.onnx", [], 1)
