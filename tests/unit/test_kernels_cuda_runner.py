"""The GPU runner and the overlapped engine against the CPU engine, on tiny random models.

Without a GPU the same code runs in Triton's interpreter, without graphs.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU

from cloud.serving.block_pool import BlockPool  # isort: skip  (the interpreter switch comes first)
from cloud.serving.cuda_engine import OverlappedEngine
from cloud.serving.cuda_runner import CudaConfig, CudaRunner
from cloud.serving.engine import Engine
from cloud.serving.kv_pool import KvLayout, KvPool
from cloud.serving.models.decoder import Decoder, DecoderConfig, DecoderWeights, LayerWeights
from cloud.serving.models.experts import ExpertsConfig
from cloud.serving.request import FinishReason, Pooling, Request, SamplingParams
from cloud.serving.runner import EagerRunner
from cloud.serving.scheduler import Scheduler, SchedulerConfig
from cloud.serving.torch_backend import TorchBackend
from kernels import quant, reference

SHAPE = DecoderConfig(
    family="qwen3", hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=97, max_positions=128, norm_eps=1e-6, rope_theta=10000.0, has_qk_norm=True,
)  # fmt: skip


def make_decoder(device: torch.device, has_qk_norm: bool, has_bias: bool, has_experts: bool = False) -> Decoder:
    experts = ExpertsConfig(5, 2, True) if has_experts else None
    config = dataclasses.replace(SHAPE, has_qk_norm=has_qk_norm, has_qkv_bias=has_bias, experts=experts)
    generator = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device)

    def near_one(size: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(size, generator=generator)).to(device)

    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layers = [
        LayerWeights(
            near_one(32), rand(width, 32) * 3, rand(32, 64), near_one(32),
            rand(5, 96, 32) if has_experts else rand(96, 32), rand(5, 32, 48) if has_experts else rand(32, 48),
            router=rand(5, 32) * 4 if has_experts else None,
            qkv_bias=rand(width) if has_bias else None,
            q_norm=near_one(16) if has_qk_norm else None, k_norm=near_one(16) if has_qk_norm else None,
        )
        for _ in range(config.num_layers)
    ]  # fmt: skip
    embedding = rand(97, 32) * 5
    return Decoder(config, DecoderWeights(embedding, layers, near_one(32), rand(97, 32)), TorchBackend(), 128)


def make_scheduler(num_blocks: int = 40) -> Scheduler:
    limits = SchedulerConfig(max_batch_tokens=24, max_chunk_tokens=11, max_running=4, max_context_tokens=64)
    return Scheduler(BlockPool(num_blocks, 4), limits, frozenset())


def make_requests(num_tokens: int = 4, **params: object) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in (2, 13, 5, 9, 3)]
    prompts[3] = prompts[1][:8] + prompts[3][8:]  # shares two blocks
    return [
        Request(f"r{i}", list(p), b"root", SamplingParams(max_tokens=num_tokens + i % 2, **params))  # type: ignore[arg-type]
        for i, p in enumerate(prompts)
    ]


def on_cpu(requests: list[Request], **model: bool) -> list[list[int]]:
    kv = KvPool(KvLayout(2, 2, 16, 4, "float32"), 40)
    return Engine(EagerRunner(make_decoder(torch.device("cpu"), **model), kv), make_scheduler(), kv, "f", 97).generate(
        requests
    )


def on_device(num_blocks: int, *, overlapped: bool, graphs: bool, **model: bool) -> Engine:
    kv = KvPool(KvLayout(2, 2, 16, 4, "float32"), num_blocks, str(DEVICE))
    runner = CudaRunner(make_decoder(DEVICE, **model), kv, CudaConfig(4, 64, (1, 2, 4)))
    if graphs:
        runner.capture()
    return (OverlappedEngine if overlapped else Engine)(runner, make_scheduler(num_blocks), kv, "f", 97)


# the interpreter is slow: there each engine and each kind of model once, on a GPU all of them
KINDS = list(itertools.product((False, True), (True, False), (False, True))) if ON_GPU else []


@pytest.mark.parametrize(
    ("overlapped", "graphs", "has_qk_norm", "has_bias"),
    [(*kind, not kind[2]) for kind in KINDS] or [(False, False, True, False), (True, False, False, True)],
)
def test_greedy_tokens_equal_those_of_the_cpu_engine(overlapped, graphs, has_qk_norm, has_bias):
    model = {"has_qk_norm": has_qk_norm, "has_bias": has_bias}
    engine = on_device(40, overlapped=overlapped, graphs=graphs, **model)
    assert engine.generate(make_requests()) == on_cpu(make_requests(), **model)
    engine.scheduler.check_integrity()


def test_a_mixture_of_experts_gives_the_tokens_of_the_cpu_engine():
    model = {"has_qk_norm": True, "has_bias": False, "has_experts": True}
    engine = on_device(40, overlapped=True, graphs=ON_GPU, **model)
    assert engine.generate(make_requests(2)) == on_cpu(make_requests(2), **model)


def test_a_step_that_samples_nothing_leaves_the_keys_of_its_chunk():
    model = {"has_qk_norm": True, "has_bias": False}
    engine = on_device(40, overlapped=True, graphs=False, **model)
    long_prompt = slice(1, 2)  # two chunks, of which the first draws no token
    assert engine.generate(make_requests(1)[long_prompt]) == on_cpu(make_requests(1)[long_prompt], **model)


@pytest.mark.parametrize("has_experts", [False, True])
def test_warming_up_writes_no_keys_and_changes_no_token(has_experts):
    model = {"has_qk_norm": True, "has_bias": False, "has_experts": has_experts}
    engine = on_device(40, overlapped=True, graphs=False, **model)
    for pool in (engine.cuda.kv.keys, engine.cuda.kv.values):
        for layer in pool:
            layer.zero_()
    engine.cuda.warm_up((3, 5))
    assert not any(layer.any() for layer in (*engine.cuda.kv.keys, *engine.cuda.kv.values))
    assert engine.generate(make_requests(1)[:2]) == on_cpu(make_requests(1)[:2], **model)


def test_a_full_pool_preempts_without_changing_a_token():
    model = {"has_qk_norm": True, "has_bias": False}
    engine = on_device(9, overlapped=True, graphs=ON_GPU, **model)
    assert engine.generate(make_requests(5)) == on_cpu(make_requests(5), **model)
    assert engine.scheduler.num_preemptions > 0
    engine.scheduler.check_integrity()


def test_a_stop_token_found_one_step_late_ends_the_output_at_it():
    model = {"has_qk_norm": True, "has_bias": False}
    free = on_cpu(make_requests(), **model)
    stop = frozenset({free[1][3]})
    wanted = on_cpu(make_requests(stop_token_ids=stop), **model)
    requests = make_requests(stop_token_ids=stop)
    engine = on_device(40, overlapped=True, graphs=ON_GPU, **model)
    assert engine.generate(requests) == wanted
    assert requests[1].finish_reason is FinishReason.STOP
    engine.scheduler.check_integrity()


def make_sampling_requests(num_tokens: int) -> list[Request]:
    """Greedy ones, seeded ones and penalised ones in one batch; the last needs its logits on the host."""
    kinds: list[dict[str, float]] = [
        {"temperature": 0.8, "top_k": 20, "seed": 3, "presence_penalty": 0.5},
        {"temperature": 1.3, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.3},
        {},
        {"frequency_penalty": 1.5},
        {"temperature": 0.9, "min_p": 0.05, "seed": 9, "frequency_penalty": -1.0},
    ]
    requests = make_requests(num_tokens)
    for request, params in zip(requests, kinds, strict=True):
        request.params = dataclasses.replace(request.params, **params)
    return requests


@pytest.mark.parametrize("num_blocks", [40, 9])
def test_seeded_sampling_draws_what_the_cpu_draws(num_blocks):
    model = {"has_qk_norm": True, "has_bias": False}
    engine = on_device(num_blocks, overlapped=True, graphs=ON_GPU, **model)
    assert engine.generate(make_sampling_requests(5)) == on_cpu(make_sampling_requests(5), **model)
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 9)


def test_counts_hold_where_some_draws_are_made_on_the_host():
    def make() -> list[Request]:
        requests = make_sampling_requests(6)
        requests[2].params = dataclasses.replace(requests[2].params, num_logprobs=1, max_tokens=2)
        return requests

    model = {"has_qk_norm": True, "has_bias": False}
    engine = on_device(40, overlapped=True, graphs=ON_GPU, **model)
    assert engine.generate(make()) == on_cpu(make(), **model)


@pytest.mark.parametrize(("pooling", "overlapped"), [(Pooling.MEAN, True), (Pooling.LAST, True), (Pooling.MEAN, False)])
def test_embeddings_beside_answers_are_those_of_the_cpu_engine(pooling, overlapped):
    model = {"has_qk_norm": True, "has_bias": False}

    def make() -> tuple[list[Request], list[Request]]:
        made = make_requests(4)
        for request in made[:3]:
            request.pooling = pooling
        made[4].params = dataclasses.replace(made[4].params, temperature=0.8, seed=3)
        return made[:3], made[3:]

    kv = KvPool(KvLayout(2, 2, 16, 4, "float32"), 40)
    inputs, answers = make()
    cpu = Engine(EagerRunner(make_decoder(torch.device("cpu"), **model), kv), make_scheduler(), kv, "f", 97)
    wanted = cpu.embed(inputs)
    engine = on_device(40, overlapped=overlapped, graphs=ON_GPU, **model)
    inputs, answers = make()
    for answer in answers:
        engine.scheduler.add(answer)
    vectors = engine.embed(inputs)
    while engine.has_work:
        engine.step()
    assert all(abs(mine - theirs).max() < 1e-5 for mine, theirs in zip(vectors, wanted, strict=True))
    assert [answer.token_ids[answer.num_prompt_tokens :] for answer in answers] == on_cpu(make()[1], **model)
    assert all(request.finish_reason is FinishReason.EMBEDDED for request in inputs)
    engine.scheduler.check_integrity()
    assert engine.pool.num_free == 40


def test_an_embedding_beside_a_draw_on_the_host_arrives_too():
    model = {"has_qk_norm": True, "has_bias": False}
    engine = on_device(40, overlapped=True, graphs=ON_GPU, **model)
    answer, embedded = make_requests(3, num_logprobs=1)[:2]
    embedded.pooling = Pooling.LAST
    engine.scheduler.add(answer)
    (vector,) = engine.embed([embedded])
    assert abs(float((vector**2).sum()) - 1) < 1e-5
    while engine.has_work:
        engine.step()
    assert answer.num_output_tokens == 3


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_give_the_tokens_of_what_they_stand_for(bits):
    whole, rounded = (make_decoder(place, True, True) for place in (torch.device("cpu"), DEVICE))
    for plain, packed in zip(
        (whole.weights, *whole.weights.layers), (rounded.weights, *rounded.weights.layers), strict=True
    ):
        for name in ("head",) if packed is rounded.weights else ("qkv", "output", "gate_up", "down"):
            weight = getattr(packed, name)
            made = quant.quantise(weight, bits, quant.largest_group(weight.shape[1]))
            setattr(packed, name, made)
            exact = reference.dequantised(made.packed, made.scales.double(), bits, made.group_size)
            setattr(plain, name, exact.float().cpu())
    kv = KvPool(KvLayout(2, 2, 16, 4, "float32"), 40)
    wanted = Engine(EagerRunner(whole, kv), make_scheduler(), kv, "f", 97).generate(make_requests(2))
    kv = KvPool(KvLayout(2, 2, 16, 4, "float32"), 40, str(DEVICE))
    runner = CudaRunner(rounded, kv, CudaConfig(4, 64, (1, 2, 4)))
    if ON_GPU:
        runner.capture()
    assert OverlappedEngine(runner, make_scheduler(), kv, "f", 97).generate(make_requests(2)) == wanted


def test_a_request_id_that_comes_again_does_not_inherit_blocks():
    model = {"has_qk_norm": True, "has_bias": False}
    engine = on_device(40, overlapped=True, graphs=ON_GPU, **model)
    engine.generate(make_requests(2)[2:])
    engine.scheduler.pool.allocate(9)  # so that the same requests get other blocks
    assert engine.generate(make_requests(2)[2:]) == on_cpu(make_requests(2)[2:], **model)
