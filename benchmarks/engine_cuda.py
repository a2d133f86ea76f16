"""`bench engine_cuda`: the GPU engine on random weights of true shapes, through the real scheduler and block pool.

Mix: `random.seed(s)`; 256 prompts of randint(100, 1024) random token ids, then 256 output lengths randint(100, 1024);
end-of-sequence ignored, greedy, prefix cache useless by construction, one whole mix of another seed as warm-up. TPOT at
batch b: (time for 129 outputs - time for 1 output) / 128 with prompts of 512 tokens, both run once to warm up and then
the best of two; `sampled` with the filters of `SAMPLING`. Limits: the weights and the KV that must be read, over the
copy bandwidth measured in the same run; prefill over the measured bf16 matrix rate.

The goals were measured on an H100; `environment.accelerator` names the card that a result is from.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.harness import Goal
from benchmarks.kernels import limits
from cloud.serving.block_pool import BlockPool
from cloud.serving.cuda_engine import OverlappedEngine
from cloud.serving.cuda_runner import CudaConfig, CudaRunner
from cloud.serving.kv_pool import KvLayout, KvPool
from cloud.serving.models.decoder import Decoder, DecoderConfig, DecoderWeights, LayerWeights
from cloud.serving.models.experts import ExpertsConfig
from cloud.serving.request import Request, SamplingParams
from cloud.serving.scheduler import Scheduler, SchedulerConfig
from cloud.serving.torch_backend import TorchBackend

DEVICES = ("cuda",)
ROUNDS = 2
TRACED_STEPS = 16
PROFILE_ROWS = 12
# vLLM 0.21.0 on one H100 where the issue names no other goal
GOALS = [
    Goal("qwen3_06b_mix_tok_s", 17_000, ">="),
    Goal("qwen3_06b_tpot_ms_b1", 1.1, "<="),
    Goal("qwen3_06b_tpot_ms_b8", 2.53, "<="),
    Goal("qwen3_06b_tpot_ms_b64", 4.36, "<="),
    Goal("qwen3_06b_tpot_ms_b256", 12.2, "<="),
    Goal("qwen3_06b_prefill_8192_tok_s", 240_000, ">="),
    Goal("qwen3_06b_start_s", 15, "<="),
    Goal("llama3_8b_mix_tok_s", 8_600, ">="),
    Goal("llama3_8b_tpot_ms_b1", 5.9, "<="),
    Goal("llama3_8b_tpot_ms_b8", 6.81, "<="),
    Goal("llama3_8b_tpot_ms_b64", 8.82, "<="),
    Goal("llama3_8b_tpot_ms_b256", 15.9, "<="),
    Goal("llama3_8b_prefill_8192_tok_s", 39_400, ">="),
    Goal("llama3_8b_start_s", 15, "<="),
    Goal("qwen3_moe_mix_tok_s", 8_900, ">="),
    Goal("qwen3_moe_tpot_ms_b1", 2.59, "<="),
    Goal("qwen3_moe_tpot_ms_b8", 5.92, "<="),
    Goal("qwen3_moe_tpot_ms_b64", 12.6, "<="),
    Goal("qwen3_moe_tpot_ms_b256", 15.8, "<="),
    Goal("qwen3_moe_prefill_8192_tok_s", 96_000, ">="),
    Goal("qwen3_moe_start_s", 15, "<="),
]
MAX_CONTEXT = 9216
SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}  # what Qwen3's authors recommend
BLOCK_SIZE = 64  # tokens; whole tiles of prefill, so that the copy engine fetches them
Lengths = Sequence[tuple[int, int]]  # (prompt tokens, output tokens) of each request


def _config(family: str, hidden: int, width: int, layers: int, heads: int, kv_heads: int, vocab: int) -> DecoderConfig:
    return DecoderConfig(
        family=family, hidden_size=hidden, intermediate_size=width, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, vocab_size=vocab, max_positions=MAX_CONTEXT, norm_eps=1e-6,
        rope_theta=1e6 if family == "qwen3" else 5e5, has_tied_embeddings=family == "qwen3",
        has_qk_norm=family == "qwen3",
    )  # fmt: skip


MOE = replace(
    _config("qwen3_moe", 2048, 768, 24, 32, 4, 151936),
    has_qk_norm=True,
    rope_theta=1e6,
    experts=ExpertsConfig(128, 8, is_renormalised=True),
)
SHAPES = {
    "qwen3_06b": _config("qwen3", 1024, 3072, 28, 16, 8, 151936),
    "llama3_8b": _config("llama", 4096, 14336, 32, 32, 8, 128256),
    "qwen3_moe": MOE,
}


@dataclass
class Bench:
    """One engine and the facts its limits are computed from."""

    engine: OverlappedEngine
    config: DecoderConfig
    weight_bytes: int  # read by every step
    expert_bytes: int  # of all experts, of which a step reads the chosen ones
    next_id: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)  # of all requests; greedy when empty

    def requests(self, lengths: Lengths) -> list[Request]:
        """Requests of (prompt, output) lengths with random tokens."""
        out = []
        for prompt, output in lengths:
            self.next_id += 1
            tokens = [random.randint(0, 10_000) for _ in range(prompt)]
            params = SamplingParams(max_tokens=output, ignore_eos=True, seed=self.next_id, **self.sampling)
            out.append(Request(f"r{self.next_id}", tokens, b"root", params))
        return out

    def seconds(self, lengths: Lengths) -> float:
        """Wall time of these requests from first to last."""
        requests = self.requests(lengths)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.engine.generate(requests)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def step_bytes(self, batch: int, context: float) -> float:
        """Bytes one decode step must read: all weights (of the experts, those likely to be chosen) and the KV."""
        kv = 2 * 2 * self.config.num_layers * self.config.num_kv_heads * self.config.head_dim
        experts = self.config.experts
        chosen = 0.0 if experts is None else 1 - (1 - experts.top_k / experts.num_experts) ** batch
        return self.weight_bytes + chosen * self.expert_bytes + batch * context * kv

    def token_flops(self) -> float:
        """Operations of one prompt token in all products but the head's and attention's: twice its parameters."""
        experts = self.config.experts
        share = 0.0 if experts is None else experts.top_k / experts.num_experts
        return self.weight_bytes + share * self.expert_bytes - 2 * self.config.vocab_size * self.config.hidden_size


def random_decoder(config: DecoderConfig, device: torch.device) -> tuple[Decoder, int, int]:
    """A decoder with random bf16 weights made on the device, and the bytes of all but the experts and of them."""
    torch.manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=torch.bfloat16).normal_(std=0.02)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, device=device, dtype=torch.bfloat16)

    heads, hidden, width = config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    many = () if config.experts is None else (config.experts.num_experts,)
    layers = [
        LayerWeights(
            ones(hidden), rand(qkv, hidden), rand(hidden, heads), ones(hidden), rand(*many, 2 * width, hidden),
            rand(*many, hidden, width),
            router=rand(*many, hidden) if many else None,
            q_norm=ones(config.head_dim) if config.has_qk_norm else None,
            k_norm=ones(config.head_dim) if config.has_qk_norm else None,
        )
        for _ in range(config.num_layers)
    ]  # fmt: skip
    embedding = rand(config.vocab_size, hidden)
    head = embedding if config.has_tied_embeddings else rand(config.vocab_size, hidden)
    mlp = sum(layer.gate_up.nbytes + layer.down.nbytes for layer in layers)
    size = head.nbytes + sum(layer.qkv.nbytes + layer.output.nbytes for layer in layers)
    size, of_experts = (size, mlp) if many else (size + mlp, 0)
    return (
        Decoder(config, DecoderWeights(embedding, layers, ones(hidden), head), TorchBackend(), MAX_CONTEXT),
        size,
        of_experts,
    )


def build(config: DecoderConfig, num_blocks: int) -> Bench:
    """An engine ready to serve: weights on the device, kernels compiled, graphs captured."""
    device = torch.device("cuda")
    decoder, size, of_experts = random_decoder(config, device)
    kv = KvPool(
        KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, "bfloat16"), num_blocks, "cuda"
    )
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        SchedulerConfig(
            max_batch_tokens=16_640, max_chunk_tokens=8192, max_running=256, max_waiting=1024,
            max_context_tokens=MAX_CONTEXT,
        ),
    )  # fmt: skip
    runner = CudaRunner(decoder, kv, CudaConfig(256, MAX_CONTEXT))
    runner.capture()
    bench = Bench(OverlappedEngine(runner, scheduler, kv, "bench", config.vocab_size), config, size, of_experts)
    bench.seconds([(64, 3), (300, 3)])
    gc.collect()
    gc.freeze()  # as the worker does: what lives as long as the engine need not be looked at again
    return bench


def tpot_ms(seconds: Callable[[Lengths], float], batch: int) -> float:
    """Time per output token at this batch; `seconds` runs requests and says how long they took.

    Both shapes run once before they count: the first run of a shape pays for compilers and allocators. Raises
    `ArithmeticError` when the longer run was not the slower one, as then nothing was measured.
    """
    short, long = [(512, 1)] * batch, [(512, 129)] * batch
    seconds(short)
    seconds(long)
    short_s = min(seconds(short) for _ in range(ROUNDS))
    long_s = min(seconds(long) for _ in range(ROUNDS))
    if long_s <= short_s:
        raise ArithmeticError(
            f"batch {batch}: 129 outputs took {long_s:.4f} s, 1 output {short_s:.4f} s; warm up or quiet the machine"
        )
    return (long_s - short_s) / 128 * 1e3


def mix(bench: Bench, seed: int) -> float:
    """Output tokens per second of the mixed load."""
    random.seed(seed)
    prompts = [random.randint(100, 1024) for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    return sum(outputs) / bench.seconds(list(zip(prompts, outputs, strict=True)))


def traced(bench: Bench, batch: int) -> dict[str, float]:
    """Share of a decode run in which no kernel ran; prints where the time of a step goes, kernel by kernel.

    What an earlier trace left, a hundred thousand objects, is collected first: a collection in mid-run took 45 ms.
    """
    gc.collect()
    requests = bench.requests([(512, 40)] * batch)
    for request in requests:
        bench.engine.scheduler.add(request)
    while bench.engine.scheduler.waiting or any(r.num_output_tokens < 4 for r in requests):
        bench.engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(TRACED_STEPS):
            bench.engine.step()
        torch.cuda.synchronize()
    while any(r.finish_reason is None for r in requests) or bench.engine.has_pending:
        bench.engine.step()
    kernels = [e for e in trace.events() if e.device_type.name == "CUDA"]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    total = end - spans[0][0]
    _print_profile(f"batch {batch}", kernels, total, TRACED_STEPS)
    return {f"idle_share_b{batch}": 1 - busy / total, f"step_us_b{batch}": total / TRACED_STEPS}


def trace_prefill(bench: Bench) -> None:
    """Print where a prompt of 8,192 tokens spends its time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        seconds = bench.seconds([(8192, 1)])
    kernels = [e for e in trace.events() if e.device_type.name == "CUDA"]
    _print_profile("prefill of 8192", kernels, seconds * 1e6, 1)


def _print_profile(what: str, kernels: Sequence[Any], total_us: float, num_steps: int) -> None:
    """The kernels that take most of a step, in microseconds and launches per step."""
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel.time_range.elapsed_us())
    print(f"{what}: {total_us / num_steps:.0f} us, {len(kernels) / num_steps:.0f} launches", file=sys.stderr)
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:PROFILE_ROWS]:
        mean, count = sum(times) / len(times), len(times) / num_steps
        print(f"  {sum(times) / num_steps:8.1f} us = {count:6.1f} x {mean:8.2f}  {name[:70]}", file=sys.stderr)


def host_step_ms(bench: Bench) -> float:
    """Host time of one scheduler step (schedule and complete) with 256 running, without the device."""
    scheduler = Scheduler(
        BlockPool(bench.engine.pool.num_blocks, BLOCK_SIZE),
        SchedulerConfig(
            max_batch_tokens=16_640, max_chunk_tokens=8192, max_running=256, max_waiting=1024,
            max_context_tokens=MAX_CONTEXT,
        ),
    )  # fmt: skip
    for request in bench.requests([(32, 200)] * 256):
        scheduler.add(request)
    for _ in range(3):
        chunks = scheduler.schedule()
        scheduler.complete(chunks, [1 if chunk.is_sampled else None for chunk in chunks])
    begin = time.perf_counter()
    for _ in range(50):
        scheduler.complete(scheduler.schedule(), [1] * 256)
    return (time.perf_counter() - begin) / 50 * 1e3


def measure(name: str, copy_gb_s: float, matmul_tflops: float, quick: bool) -> dict[str, float]:
    """All figures of one model."""
    begin = time.perf_counter()
    config = SHAPES[name]
    bench = build(config, (320_000 if name == "llama3_8b" else 384_000) // BLOCK_SIZE)
    torch.cuda.synchronize()
    figures = {"start_s": time.perf_counter() - begin}
    bench.seconds([(8192, 1)])
    prefill_s = min(bench.seconds([(8192, 1)]) for _ in range(3))
    figures["prefill_8192_tok_s"] = 8192 / prefill_s
    flops = 8192 * bench.token_flops()
    flops += 4 * config.num_layers * config.num_heads * config.head_dim * 8192 * 8192 / 2
    figures["prefill_8192_share"] = flops / prefill_s / 1e12 / matmul_tflops
    for batch in (1, 8, 64, 256):
        figures[f"tpot_ms_b{batch}"] = tpot_ms(bench.seconds, batch)
        bound_ms = bench.step_bytes(batch, 512 + 64) / copy_gb_s / 1e6
        figures[f"tpot_share_b{batch}"] = bound_ms / figures[f"tpot_ms_b{batch}"]
    bench.sampling = SAMPLING
    for batch in (1, 256):
        figures[f"sampled_tpot_ms_b{batch}"] = tpot_ms(bench.seconds, batch)
    bench.sampling = {}
    mix(bench, 1)
    figures["mix_tok_s"] = mix(bench, 0)
    for batch in (1, 8, 64, 256):
        figures |= traced(bench, batch)
    trace_prefill(bench)
    figures["scheduler_step_ms_256"] = host_step_ms(bench)
    for key, value in figures.items():
        print(f"{name}_{key:32s} {value:12.5g}", file=sys.stderr, flush=True)
    return {f"{name}_{key}": value for key, value in figures.items()}


def run(quick: bool, device: str = "cuda") -> dict[str, float]:
    """All models' figures; empty without a CUDA device."""
    if not torch.cuda.is_available():
        print("no CUDA device: this benchmark needs one", file=sys.stderr)
        return {}
    ceilings = limits(quick=True)
    figures = dict(ceilings)
    for name in SHAPES:
        figures |= measure(name, ceilings["copy_gb_s"], ceilings["matmul_tflops"], quick)
        gc.collect()
        torch.cuda.empty_cache()
    return figures
