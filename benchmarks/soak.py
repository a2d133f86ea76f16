"""`bench soak`: one hour of ordinary and hostile traffic on a prefill and a decode worker over real gRPC, on the CPU.

Traffic, drawn from a seed: answers of every kind of sampling, some with a hand-off; clients that leave at a random
token; prompts that are too long, empty, or of unknown tokens; parameters out of range; wrong versions; ids in use; and
bursts above the queue. Every 30 s the traffic stops and the engines must be empty: no running request, no block in use,
`check_integrity` silent. `--quick` takes 2 minutes.

Memory: resident size at the first quiet moment after a tenth of the time, against the last one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from safetensors.torch import save_file

from benchmarks.harness import Goal
from cloud.serving.engine import Engine, EngineConfig, build_engine
from cloud.serving.engine_thread import EngineThread
from cloud.serving.rpc import OPTIONS, PROTOCOL_VERSION, error_from
from cloud.serving.scheduler import SchedulerConfig
from cloud.serving.worker import WorkerConfig, WorkerServer
from wire import engine_pb2 as pb
from wire.engine_pb2_grpc import EngineStub
from wire.errors import ForeshoreError, OverloadedError

GOALS = [
    Goal("leaked_blocks", 0, "<="),
    Goal("unclear_refusals", 0, "<="),
    Goal("wrong_outcomes", 0, "<="),
    Goal("memory_growth_mb", 32, "<="),
]
SEED = 5
HOUR_S, QUICK_S = 3600.0, 120.0
ROUND_S = 30.0
NUM_CLIENTS = 12  # above what runs and waits at once, so that queues overflow
VOCAB, MAX_CONTEXT = 300, 256
LIMITS = SchedulerConfig(
    max_batch_tokens=64, max_chunk_tokens=24, max_running=6, max_waiting=4, max_context_tokens=MAX_CONTEXT
)
BAD_SAMPLING = ({"temperature": -1.0}, {"top_p": 7.0}, {"max_tokens": 0}, {"logprobs": 99}, {"min_p": 2.0})


@dataclass
class Tally:
    """What happened so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    unclear: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run(quick: bool) -> dict[str, float]:
    """Run the soak; the figures say what leaked, what was refused badly and how memory grew."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_soak(_make_model(Path(folder)), QUICK_S if quick else HOUR_S))


async def _soak(model: Path, duration_s: float) -> dict[str, float]:
    tally, rng, process = Tally(), random.Random(SEED), psutil.Process()
    memory: list[tuple[float, float]] = []
    leaked = 0
    async with AsyncExitStack() as stack:
        engines, addresses = [], []
        for role in ("prefill", "decode"):
            limits = EngineConfig(model, num_blocks=80, block_size=8, scheduler=LIMITS)
            server = WorkerServer(WorkerConfig(role, role), EngineThread(build_engine(limits)))
            addresses.append(f"127.0.0.1:{await server.start('127.0.0.1', 0)}")
            stack.push_async_callback(server.drain, 0.0)
            engines.append(server.engine)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(addresses[1], options=OPTIONS))
        stub: Any = EngineStub(channel)  # type: ignore[no-untyped-call]
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < duration_s:
            end = time.monotonic() + min(ROUND_S, duration_s - elapsed)
            async with asyncio.TaskGroup() as group:
                for number in range(NUM_CLIENTS):
                    seed = rng.getrandbits(64)
                    group.create_task(_client(stub, addresses[0], random.Random(seed), end, tally), name=f"c{number}")
            leaked += sum([await _count_leaks(thread) for thread in engines])
            gc.collect()
            memory.append((time.monotonic() - began, process.memory_info().rss / 1e6))
            print(f"{memory[-1][0]:6.0f} s {memory[-1][1]:7.1f} MB {dict(tally.outcomes)}", file=sys.stderr, flush=True)
        preemptions = sum(thread.engine.scheduler.num_preemptions for thread in engines)
    first = next((size for at, size in memory if at >= duration_s / 10), memory[0][1])
    for problem in (tally.unclear + tally.wrong)[:20]:
        print(problem, file=sys.stderr)
    return {
        "duration_s": time.monotonic() - began,
        "requests": float(tally.outcomes.total()),
        **{name.replace(" ", "_"): float(count) for name, count in sorted(tally.outcomes.items())},
        "preemptions": float(preemptions),
        "leaked_blocks": float(leaked),
        "unclear_refusals": float(len(tally.unclear)),
        "wrong_outcomes": float(len(tally.wrong)),
        "memory_mb": memory[-1][1],
        "memory_growth_mb": memory[-1][1] - first,
    }


async def _client(stub: Any, prefill_address: str, rng: random.Random, end: float, tally: Tally) -> None:
    """Send requests one after the other until `end`."""
    while time.monotonic() < end:
        kind = rng.choices(("answer", "leave", "bad", "late"), (5, 4, 3, 1))[0]
        request = _bad_request(rng) if kind == "bad" else _good_request(rng, prefill_address)
        if kind == "late":
            request.sampling.max_tokens = 60
        outcome = await _send(stub, request, leave_at=rng.randint(0, 12) if kind == "leave" else None, tally=tally)
        tally.outcomes[outcome] += 1
        expected = {"refused"} if kind == "bad" else {"answered", "left", "overloaded"}
        if outcome not in expected:
            tally.wrong.append(f"{kind} request ended as {outcome}")
        await asyncio.sleep(rng.uniform(0.05, 0.6))


async def _send(stub: Any, request: Any, leave_at: int | None, tally: Tally) -> str:
    call = stub.Generate(request)
    num_tokens, reason = 0, ""
    try:
        async with asyncio.timeout(60):
            async for event in call:
                num_tokens += event.HasField("token")
                reason = event.finished.reason
                if leave_at is not None and num_tokens >= leave_at:
                    return "left"
    except grpc.aio.AioRpcError as error:
        cause = error_from(error)
        if not isinstance(cause, ForeshoreError) or not cause.message or not cause.remedy:
            tally.unclear.append(f"{type(cause).__name__}: {cause}")
        return "overloaded" if isinstance(cause, OverloadedError) else "refused"
    except TimeoutError:
        return "silent"
    finally:
        call.cancel()
    is_whole = reason == "stop" or num_tokens == request.sampling.max_tokens
    return "answered" if is_whole or reason == "length" else "cut short"


def _good_request(rng: random.Random, prefill_address: str) -> Any:
    shared = [(i * 7) % VOCAB for i in range(rng.choice((0, 0, 40, 96)))]
    sampling = rng.choice(
        (
            {},
            {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": rng.getrandbits(40)},
            {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.3},
            {"repetition_penalty": 1.2, "logprobs": 3},
        )
    )
    message = pb.GenerateRequest(
        protocol_version=PROTOCOL_VERSION,
        request_id=f"{rng.getrandbits(64):x}",
        token_ids=shared + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 120))],
        salt=rng.choice((b"a", b"b")),
        sampling=pb.Sampling(max_tokens=rng.randint(1, 24), ignore_eos=rng.random() < 0.8, **sampling),
        priority=rng.randint(-1, 1),
    )
    if rng.random() < 0.3:
        message.prefill.worker, message.prefill.address = "prefill", prefill_address
    return message


def _bad_request(rng: random.Random) -> Any:
    message = _good_request(rng, "127.0.0.1:1")
    message.ClearField("prefill")
    kind = rng.randrange(7)
    if kind == 0:
        message.token_ids.extend([1] * MAX_CONTEXT)
    elif kind == 1:
        del message.token_ids[:]
    elif kind == 2:
        message.token_ids.append(VOCAB + rng.randrange(1 << 20))
    elif kind == 3:
        message.sampling.MergeFrom(pb.Sampling(**(wrong := rng.choice(BAD_SAMPLING))))
        if wrong == {"max_tokens": 0}:
            message.sampling.max_tokens = 0
    elif kind == 4:
        message.protocol_version = 99
    elif kind == 5:
        message.request_id = "x" * 500
    else:
        message.salt = b"s" * 500
    return message


async def _count_leaks(thread: EngineThread) -> int:
    """Blocks still in use when nobody asks for anything; waits a little for cancellations to arrive."""

    def used(engine: Engine) -> int:
        if engine.scheduler.has_work:
            return -1
        engine.scheduler.check_integrity()
        return engine.pool.num_blocks - engine.pool.num_free

    count = -1
    for _ in range(100):
        count = await thread.call(lambda: used(thread.engine))
        if count == 0:
            break
        await asyncio.sleep(0.05)
    with suppress(KeyError):
        assert not thread.num_streams, "a stream outlived its client"
    return abs(count)


def _make_model(folder: Path) -> Path:
    """A random Llama of three small layers."""
    hidden, width, heads, kv_heads = 48, 80, 6, 2
    torch.manual_seed(SEED)
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": 3, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6,
        "max_position_embeddings": MAX_CONTEXT, "tie_word_embeddings": True, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, hidden), "model.norm.weight": torch.ones(hidden)}
    head = hidden // heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
    }  # fmt: skip
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = torch.randn(*shape) * shape[1] ** -0.5
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(hidden)
    save_file(tensors, folder / "model.safetensors")
    return folder
