"""The serving engine: on CPU against transformers (and vLLM, where set up) in the same run, on CUDA by `engine_cuda`.

CPU: SmolLM2-135M (and Qwen2.5-0.5B when its folder is in the cache) in bfloat16, same threads; prefill of 512 tokens,
greedy decoding alone and eight at once. Both sides warm up, then take turns, and the best of three (`--quick`: two)
counts: a clock that rises or a neighbour that comes meets both. Ratios above 1 mean that the engine is faster. Limit of
decoding alone: memory bandwidth over the size of the weights, given as a share of the bandwidth measured by a large
copy.
Weights in 8 and 4 bits are figures of their own, left out by `--quick`.
OMP_NUM_THREADS sets the threads of all. vLLM runs where FORESHORE_VLLM_PYTHON names an interpreter that has it
(`benchmarks/_vllm_peer.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import _vllm_peer
from benchmarks.harness import Goal

DEVICES = ("cpu", "cuda")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"
MODELS = {"smollm2": "smollm2-135m-instruct", "qwen05": "qwen2.5-coder-0.5b-instruct"}
KINDS = ("prefill", "decode1", "decode8")
VLLM_PYTHON = "FORESHORE_VLLM_PYTHON"
GOALS = [
    Goal(f"ratio_vs_{peer}_{model}_{kind}", 1.0, ">=")
    for peer in ("transformers", *(["vllm_cpu"] if VLLM_PYTHON in os.environ else []))
    for model, folder in MODELS.items()
    if model == "smollm2" or (CACHE / folder / "config.json").is_file()
    for kind in KINDS
]
PREFILL_TOKENS = 512
ROUNDS = 3
Rate = Callable[[], float]


def run(quick: bool, device: str = "cpu") -> dict[str, float]:
    """Measure every model that is in the cache."""
    if device == "cuda":
        from benchmarks import engine_cuda

        return engine_cuda.run(quick, device)
    figures: dict[str, float] = {}
    for name, folder in MODELS.items():
        if (CACHE / folder / "config.json").is_file():
            figures |= _measure(name, CACHE / folder, *((12, 2) if quick else (48, 3)))
            if not quick:
                figures |= _measure_packed(name, CACHE / folder, 48)
    return figures


def _measure(name: str, folder: Path, num_new: int, num_rounds: int) -> dict[str, float]:
    ours, weight_bytes = _ours(folder, num_new)
    theirs = _theirs(folder, num_new)
    rates: dict[str, dict[str, float]] = {"": {}, "transformers": {}}
    for kind in KINDS:
        ours[kind]()
        theirs[kind]()
        turns = [(ours[kind](), theirs[kind]()) for _ in range(num_rounds)]
        rates[""][kind], rates["transformers"][kind] = (max(rate) for rate in zip(*turns, strict=True))
        print(
            f"  {name} {kind}: {rates[''][kind]:.1f} tok/s, transformers {rates['transformers'][kind]:.1f}", flush=True
        )
    del theirs
    if python := os.environ.get(VLLM_PYTHON):
        rates["vllm_cpu"] = _vllm_peer.measure(python, folder, num_new, torch.get_num_threads(), num_rounds)
        print(f"  {name}: vllm_cpu {rates['vllm_cpu']}", flush=True)
    own = rates.pop("")
    figures = {f"{name}_{kind}_tok_s": rate for kind, rate in own.items()}
    for peer, rate in rates.items():
        for kind in KINDS:
            figures[f"{name}_{kind}_tok_s_{peer}"] = rate[kind]
            figures[f"ratio_vs_{peer}_{name}_{kind}"] = own[kind] / rate[kind]
    figures[f"{name}_decode1_share_of_bandwidth"] = own["decode1"] * weight_bytes / _read_bandwidth()
    return figures


def _measure_packed(name: str, folder: Path, num_new: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for bits in (8, 4):
        packed, _ = _ours(folder, num_new, bits)
        for kind in KINDS:
            packed[kind]()
            figures[f"{name}_int{bits}_{kind}_tok_s"] = max(packed[kind]() for _ in range(ROUNDS))
            print(f"  {name} int{bits} {kind}: {figures[f'{name}_int{bits}_{kind}_tok_s']:.1f} tok/s", flush=True)
    return figures


def _ours(folder: Path, num_new: int, weight_bits: int = 16) -> tuple[dict[str, Rate], int]:
    """By kind, what measures tokens per second once; and the bytes of the weights that a step reads."""
    from cloud.serving.engine import EngineConfig, build_engine
    from cloud.serving.request import Request, SamplingParams
    from cloud.serving.scheduler import SchedulerConfig

    limits = SchedulerConfig(max_batch_tokens=1024, max_chunk_tokens=PREFILL_TOKENS)
    engine = build_engine(EngineConfig(folder, dtype="bfloat16", scheduler=limits, weight_bits=weight_bits))
    params = SamplingParams(max_tokens=num_new, ignore_eos=True)
    counter = iter(range(1 << 30))

    def request(length: int, wanted: Any = params) -> Any:
        number = next(counter)
        return Request(
            str(number), [(number * 31 + i * 7) % 9000 + 10 for i in range(length)], engine.root(b""), wanted
        )

    def decode(batch: int) -> float:
        requests = [request(32) for _ in range(batch)]
        for one in requests:
            engine.scheduler.add(one)
        engine.step()  # the prompts
        began = time.perf_counter()
        while any(one.finish_reason is None for one in requests):
            engine.step()
        return batch * (num_new - 1) / (time.perf_counter() - began)

    def prefill() -> float:
        began = time.perf_counter()
        engine.generate([request(PREFILL_TOKENS, SamplingParams(max_tokens=1, ignore_eos=True))])
        return PREFILL_TOKENS / (time.perf_counter() - began)

    weights = sum(weight.nbytes for weight in _tensors(engine))
    return {"prefill": prefill, "decode1": lambda: decode(1), "decode8": lambda: decode(8)}, weights


def _theirs(folder: Path, num_new: int) -> dict[str, Rate]:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    @torch.inference_mode()
    def decode(batch: int) -> float:
        out = model(torch.randint(10, 9000, (batch, 32)), use_cache=True)
        began = time.perf_counter()
        for _ in range(num_new - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return batch * (num_new - 1) / (time.perf_counter() - began)

    @torch.inference_mode()
    def prefill() -> float:
        began = time.perf_counter()
        model(torch.randint(10, 9000, (1, PREFILL_TOKENS)), use_cache=True, logits_to_keep=1)
        return PREFILL_TOKENS / (time.perf_counter() - began)

    return {"prefill": prefill, "decode1": lambda: decode(1), "decode8": lambda: decode(8)}


def _tensors(engine: Any) -> list[Any]:
    weights = engine.runner.decoder.weights
    names = ("qkv", "output", "gate_up", "down")
    return [weights.head, *(getattr(layer, name) for layer in weights.layers for name in names)]


def _read_bandwidth() -> float:
    """Bytes per second of a sum over 256 MiB: what reading weights could reach at best."""
    data = torch.ones(64 << 20)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - began)
    return data.numel() * 4 / min(times)
