"""`bench kernels`: each Triton kernel's share of what this very device can do, and its error against float64.

Bandwidth-bound kernels are compared with a large device-to-device copy, compute-bound ones with a large bf16 product,
both measured in the same run. Inputs are random and larger than the L2 cache. Without a CUDA device nothing is timed:
the interpreter's times mean nothing.

`python -m benchmarks.kernels --tune` also sweeps the tiles of the attention kernels and prints the best.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from benchmarks.harness import Goal
from kernels import (
    activation,
    decode_attention,
    gemv,
    kv_cache,
    moe,
    norm,
    paged,
    prefill_attention,
    quant,
    reference,
    sampling,
)

DEVICES = ("cuda",)
GOALS = [
    *(
        Goal(f"decode_attention_share_g{group}_page{page}", 0.80, ">=")
        for group, page in ((4, 16), (4, 64), (4, 256), (8, 16))
    ),
    Goal("prefill_8k_tflops_g4", 400, ">="),
    Goal("rms_norm_share", 0.85, ">="),
    Goal("rotary_write_share", 0.85, ">="),
    Goal("silu_mul_share", 0.85, ">="),
    Goal("block_gather_share", 0.85, ">="),
]
HEAD_DIM = 128
DECODE_TILES = [
    paged.Tile(16, n, w, s) for n, w, s in ((32, 2, 4), (64, 4, 3), (64, 2, 3), (64, 4, 4), (64, 4, 5), (64, 8, 3))
]
PREFILL_TILES = [
    paged.Tile(m, n, w, s)
    for m, n, w, s in ((128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2))
]
GEMV_SHAPES = {"small": (6144, 1024), "square": (4096, 4096), "wide": (28672, 4096), "deep": (4096, 14336)}


def seconds(call: Callable[[], Any], quick: bool) -> float:
    """Median time of one call on the device."""
    repeat_ms = 40 if quick else 120
    return triton.testing.do_bench(call, warmup=15, rep=repeat_ms, return_mode="median") / 1e3


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def limits(quick: bool) -> dict[str, float]:
    """Copy bandwidth (read + write) and bf16 matrix rate of this device."""
    source = rand(1 << 31)
    target = torch.empty_like(source)
    copy_s = seconds(functools.partial(target.copy_, source), quick)

    a, b = rand(8192, 8192), rand(8192, 8192)
    product_s = seconds(lambda: a @ b, quick)
    return {"copy_gb_s": 2 * 2 * (1 << 31) / copy_s / 1e9, "matmul_tflops": 2 * 8192**3 / product_s / 1e12}


class PagedCase:
    """Random paged KV of `num_seqs` sequences of one length, blocks in random order."""

    def __init__(self, num_seqs: int, length: int, kv_heads: int, group: int, page: int) -> None:
        blocks = -(-length // page)
        table = torch.randperm(num_seqs * blocks, device="cuda").view(num_seqs, blocks)
        self.num_seqs, self.length, self.kv_heads, self.heads = num_seqs, length, kv_heads, kv_heads * group
        self.caches = [rand(num_seqs * blocks, page, kv_heads, HEAD_DIM) for _ in range(2)]
        self.table = table.to(torch.int32)
        self.lens = torch.full((num_seqs,), length, dtype=torch.int32, device="cuda")

    @property
    def kv_bytes(self) -> int:
        return 2 * self.num_seqs * self.length * self.kv_heads * HEAD_DIM * 2

    def decode(self, tile: paged.Tile | None = None, splits: int | None = None) -> Callable[[], torch.Tensor]:
        q = rand(self.num_seqs, self.heads, HEAD_DIM)
        out = torch.full_like(q, float("nan"))
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        splits = splits or decode_attention.num_splits_for(self.num_seqs, self.kv_heads, self.length, processors)
        workspace = decode_attention.SplitWorkspace.allocate(self.num_seqs, self.heads, HEAD_DIM, splits, q.device)
        self.q = q
        return lambda: decode_attention.decode(
            q, *self.caches, self.table, self.lens, HEAD_DIM**-0.5, out, splits, workspace, tile=tile
        )

    def prefill(self, tile: paged.Tile | None = None) -> Callable[[], torch.Tensor]:
        q = rand(self.num_seqs * self.length, self.heads, HEAD_DIM)
        out = torch.full_like(q, float("nan"))
        starts = torch.arange(self.num_seqs + 1, device="cuda", dtype=torch.int32) * self.length
        self.q, self.starts = q, starts
        return lambda: prefill_attention.prefill(
            q, *self.caches, self.table, self.lens, starts, HEAD_DIM**-0.5, out, tile=tile
        )


def decoding(copy_gb_s: float, quick: bool) -> dict[str, float]:
    figures = {}
    for group, page in ((4, 16), (4, 64), (4, 256), (8, 16), (2, 16)):
        case = PagedCase(128, 2048, 8, group, page)
        call = case.decode()
        rate = case.kv_bytes / seconds(call, quick) / 1e9
        figures[f"decode_attention_gb_s_g{group}_page{page}"] = rate
        figures[f"decode_attention_share_g{group}_page{page}"] = rate / copy_gb_s
    for num_seqs, length in ((1, 65536), (8, 8192), (256, 800), (8, 1024), (1, 1024)):
        case = PagedCase(num_seqs, length, 8, 4, 16)
        figures[f"decode_attention_us_{num_seqs}x{length}"] = seconds(case.decode(), quick) * 1e6
    case = PagedCase(3, 777, 2, 4, 16)
    got = case.decode(splits=4)()
    starts = torch.arange(4, device="cuda", dtype=torch.int32)
    wanted = reference.paged_attention(
        case.q.double(), case.caches[0].double(), case.caches[1].double(), case.table, case.lens, starts, HEAD_DIM**-0.5
    )
    figures["decode_attention_error"] = relative_error(got, wanted)
    return figures


def prefilling(matmul_tflops: float, quick: bool) -> dict[str, float]:
    figures = {}
    for group, kv_heads, page in ((4, 8, 16), (4, 8, 128), (2, 8, 16)):
        case = PagedCase(1, 8192, kv_heads, group, page)
        flops = 4 * case.heads * HEAD_DIM * 8192 * 8192 / 2
        rate = flops / seconds(case.prefill(), quick) / 1e12
        name = f"prefill_8k_tflops_g{group}" + ("" if page == 16 else f"_page{page}")
        figures[name] = rate
        figures[name.replace("tflops", "share")] = rate / matmul_tflops
    case = PagedCase(2, 500, 2, 4, 16)
    got = case.prefill()()
    wanted = reference.paged_attention(
        case.q.double(), *(c.double() for c in case.caches), case.table, case.lens, case.starts, HEAD_DIM**-0.5
    )
    figures["prefill_attention_error"] = relative_error(got, wanted)
    return figures


def elementwise(copy_gb_s: float, quick: bool) -> dict[str, float]:
    rows, width = 32768, 4096
    x, residual, weight = rand(rows, width), rand(rows, width), rand(width)
    out = torch.empty_like(x)
    times = {
        "rms_norm": (seconds(lambda: norm.rms_norm(x, weight, 1e-6, out), quick), 2 * x.nbytes),
        "add_rms_norm": (seconds(lambda: norm.add_rms_norm(x, residual, weight, 1e-6, out), quick), 4 * x.nbytes),
    }
    gate_up = rand(rows, 2 * 6144)
    act = rand(rows, 6144)
    times["silu_mul"] = (seconds(lambda: activation.silu_mul(gate_up, act), quick), 3 * act.nbytes)
    heads, kv_heads, page = 32, 8, 16
    qkv = rand(rows, (heads + 2 * kv_heads) * HEAD_DIM)
    caches = [rand(rows // page, page, kv_heads, HEAD_DIM) for _ in range(2)]
    positions = torch.arange(rows, device="cuda")
    slots = torch.randperm(rows, device="cuda")
    table = rand(rows, HEAD_DIM, dtype=torch.float32)
    q_out = rand(rows, heads, HEAD_DIM)
    times["rotary_write"] = (
        seconds(lambda: kv_cache.rotary_and_write(qkv, positions, slots, table, *caches, q_out), quick),
        2 * qkv.nbytes + table.nbytes,
    )
    blocks = 4 * rows // page  # 268 MB, so that neither the L2 cache nor the launch counts
    pool = rand(blocks, page, kv_heads, HEAD_DIM)
    ids = torch.randperm(blocks, device="cuda").to(torch.int32)
    order = torch.arange(blocks, device="cuda", dtype=torch.int32)
    wire = torch.empty_like(pool)
    times["block_gather"] = (
        seconds(lambda: kv_cache.copy_blocks(pool, wire, ids, order), quick), 2 * wire.nbytes
    )  # fmt: skip
    times["pack_int4"] = (seconds(lambda: kv_cache.pack_int4(wire), quick), int(wire.nbytes * 1.27))
    figures = {f"{name}_share": size / time / 1e9 / copy_gb_s for name, (time, size) in times.items()}
    figures["rms_norm_error"] = relative_error(
        norm.rms_norm(x[:64], weight, 1e-6, out[:64]), reference.rms_norm(x[:64].double(), weight.double(), 1e-6)
    )
    return figures


def experts(copy_gb_s: float, matmul_tflops: float, quick: bool) -> dict[str, float]:
    """The mixture of experts of Qwen3-30B-A3B: rate of the products at a prompt, of the weights while decoding."""
    num_experts, top_k, hidden, width = 128, 8, 2048, 768
    gate_up, down = rand(num_experts, 2 * width, hidden) * hidden**-0.5, rand(num_experts, hidden, width) * width**-0.5
    figures = {}
    for tokens in (1, 64, 256, 8192):
        x = rand(tokens, hidden)
        weights, chosen = moe.route(rand(tokens, num_experts), top_k, True)
        time = seconds(functools.partial(moe.experts_mlp, x, gate_up, down, weights, chosen), quick)
        flops = 6 * tokens * top_k * hidden * width
        size = 6 * hidden * width * chosen.unique().numel()
        bound_s = max(flops / matmul_tflops / 1e12, size / copy_gb_s / 1e9)
        figures[f"moe_us_{tokens}"] = time * 1e6
        figures[f"moe_share_{tokens}"] = bound_s / time
    x, logits = rand(40, hidden), rand(40, 16)
    weights, chosen = moe.route(logits, top_k, True)
    wanted = reference.moe_mlp(x.double(), gate_up[:16].double(), down[:16].double(), weights.double(), chosen)
    figures["moe_error"] = relative_error(moe.experts_mlp(x, gate_up[:16], down[:16], weights, chosen), wanted)
    return figures


def quantised(copy_gb_s: float, matmul_tflops: float, quick: bool) -> dict[str, float]:
    """Weight-only products of a large MLP, and their error against the same rounded weights."""
    out, depth = 28672, 8192
    original = rand(out, depth)
    figures = {}
    for bits in (8, 4):
        weight = quant.quantise(original, bits)
        for rows in (1, 16, 256):
            time = seconds(functools.partial(quant.linear, rand(rows, depth), weight), quick)
            size = weight.packed.nbytes + weight.scales.nbytes
            bound_s = max(2 * rows * out * depth / matmul_tflops / 1e12, size / copy_gb_s / 1e9)
            figures[f"int{bits}_gemm_share_{rows}"] = bound_s / time
        x = rand(16, depth)
        part = quant.QuantWeight(weight.packed[:512], weight.scales[:512], bits, weight.group_size)
        wanted = x.double() @ reference.dequantised(part.packed, part.scales.double(), bits, part.group_size).T
        figures[f"int{bits}_gemm_error"] = relative_error(quant.linear(x, part), wanted)
    return figures


def draws(copy_gb_s: float, quick: bool) -> dict[str, float]:
    """Drawing against reading the logits once, vocabulary of Qwen3; the filters are those its authors recommend."""
    figures: dict[str, float] = {}
    kinds = {"temperature": {}, "filters": {"top_k": 20, "top_p": 0.95}}
    for rows in (1, 64, 256):
        logits = rand(rows, 151_936) * 3
        latest, out = (torch.zeros(rows, dtype=torch.int32, device="cuda") for _ in range(2))
        for kind, filters in kinds.items():
            packed = sampling.pack([sampling.Draw(i, i, 7, temperature=0.6, **filters) for i in range(rows)])
            on_device = torch.from_numpy(packed).cuda()
            took = seconds(functools.partial(sampling.draw, logits, on_device, latest, latest, out), quick)
            figures[f"draw_{kind}_b{rows}_us"] = took * 1e6
            figures[f"draw_{kind}_b{rows}_share"] = logits.nbytes / took / 1e9 / copy_gb_s
    return figures


def run(quick: bool, device: str = "cuda") -> dict[str, float]:
    """All figures; empty without a CUDA device."""
    if not torch.cuda.is_available():
        print("no CUDA device: kernels are timed on a GPU only", file=sys.stderr)
        return {}
    torch.manual_seed(0)
    figures = limits(quick)
    figures |= decoding(figures["copy_gb_s"], quick)
    figures |= prefilling(figures["matmul_tflops"], quick)
    figures |= elementwise(figures["copy_gb_s"], quick)
    figures |= experts(figures["copy_gb_s"], figures["matmul_tflops"], quick)
    figures |= vector_products(figures["copy_gb_s"], quick)
    figures |= quantised(figures["copy_gb_s"], figures["matmul_tflops"], quick)
    figures |= draws(figures["copy_gb_s"], quick)
    for name, value in figures.items():
        print(f"{name:42s} {value:12.5g}", file=sys.stderr)
    return figures


def vector_products(copy_gb_s: float, quick: bool) -> dict[str, float]:
    """Products of few rows with weights of true sizes, a new weight each time so that no cache helps."""
    figures = {}
    for name, (columns, depth) in GEMV_SHAPES.items():
        weights = [rand(columns, depth) for _ in range(max(2, (200 << 20) // (2 * columns * depth)))]
        for rows in (1, 2, 4):
            x, out = rand(rows, depth), rand(rows, columns)
            ours = _graph_seconds([functools.partial(gemv.linear, x, w, out) for w in weights])
            library = _graph_seconds([functools.partial(torch.nn.functional.linear, x, w) for w in weights])
            figures[f"gemv_{name}_share_{rows}"] = 2 * columns * depth / ours / 1e9 / copy_gb_s
            figures[f"gemv_{name}_vs_library_{rows}"] = library / ours
    x, w, out = rand(1, 4096), rand(512, 4096), rand(1, 512)
    figures["gemv_error"] = relative_error(gemv.linear(x, w, out), x.double() @ w.double().T)
    return figures


def _graph_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Time of one of these calls when a graph runs them one after the other, best of ten runs of the graph."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return min(times)


def tune() -> None:
    """Time every tile on the shapes that decide, and print a table."""
    for page in (16, 64):
        case = PagedCase(128, 2048, 8, 4, page)
        for tile in DECODE_TILES:
            _print_tile(f"decode page {page}", tile, case.decode(tile, 1), case.kv_bytes / 1e9, "GB/s")
    for page in (16, 64, 128):
        case = PagedCase(1, 8192, 8, 4, page)
        for tile in PREFILL_TILES:
            work = 4 * case.heads * HEAD_DIM * 8192 * 8192 / 2 / 1e12
            _print_tile(f"prefill page {page}", tile, case.prefill(tile), work, "TFLOP/s")


def _print_tile(what: str, tile: paged.Tile, call: Callable[[], Any], work: float, unit: str) -> None:
    try:
        rate = f"{work / seconds(call, quick=True):9.1f} {unit}"
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        rate = f"not possible: {type(error).__name__}"
    print(
        f"{what:28s} {tile.rows:4d} x {tile.columns:4d} warps {tile.num_warps} stages {tile.num_stages}: {rate}",
        flush=True,
    )


if __name__ == "__main__" and "--tune" in sys.argv:
    tune()
