"""Greedy output equals transformers' token by token, however the work is cut up: real models, every combination.

{batched, alone} x {whole prompts, chunks} x {prefix hit, miss} x {preempted, not}; on a GPU also with and without
graphs. Models in the cache are taken (SmolLM2 always, Qwen2.5 where it was fetched); without them the tests skip.
float32 must be exact. In bfloat16 a token may differ only where the reference itself holds both for equally likely, up
to the rounding of its logits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU

from cloud.serving.block_pool import BlockPool, chain_root  # isort: skip  (the interpreter switch comes first)
from cloud.serving.cuda_engine import OverlappedEngine
from cloud.serving.cuda_runner import CudaConfig, CudaRunner
from cloud.serving.engine import Engine
from cloud.serving.kv_pool import KvLayout, KvPool
from cloud.serving.models.decoder import Decoder
from cloud.serving.request import Request, SamplingParams
from cloud.serving.runner import EagerRunner
from cloud.serving.scheduler import Scheduler, SchedulerConfig
from cloud.serving.torch_backend import TorchBackend
from cloud.serving.weights import load_config, load_decoder

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "models"
pytestmark = [pytest.mark.models, pytest.mark.slow]
MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
NEW_TOKENS = 12
BLOCK_SIZE = 8
NUM_BLOCKS = 96
SHARED_BLOCKS = 4  # of the first and the last prompt
COMMON = [(i * 37) % 5000 + 100 for i in range(48)]
PROMPTS = [
    [*COMMON, 400, 401, 402],
    [(i * 91) % 4000 + 50 for i in range(9)],
    [*COMMON[:32], *range(700, 730)],
]
BF16_STEP = 2.0**-7  # twice the rounding of a bfloat16 logit, relative


@dataclass
class Subject:
    """A loaded model, its reference's answers, and what is built once for all combinations."""

    decoder: Decoder
    reference: Any
    answers: list[list[int]]
    eager: dict[bool, Any] = field(default_factory=dict)

    def kv(self) -> KvPool:
        config = self.decoder.config
        dtype = str(self.decoder.weights.embedding.dtype).removeprefix("torch.")
        layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, dtype)
        return KvPool(layout, NUM_BLOCKS, str(DEVICE))

    def runner(self, graphs: bool) -> Any:
        if graphs not in self.eager:
            if ON_GPU:
                runner = CudaRunner(self.decoder, self.kv(), CudaConfig(4, 256, (1, 2, 4)))
                if graphs:
                    runner.capture()
                self.eager[graphs] = runner
            else:
                self.eager[graphs] = EagerRunner(self.decoder, self.kv())
        return self.eager[graphs]


def load(name: str, dtype: torch.dtype) -> Subject:
    import transformers

    folder = CACHE / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{name} is not in the cache; scripts/prepare_models.py makes it")
    config = load_config(folder)
    decoder = load_decoder(folder, config, TorchBackend(), dtype, 256, str(DEVICE))
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            out = reference(torch.tensor([prompt]), use_cache=True)
            answers.append([int(out.logits[0, -1].argmax())])
            while len(answers[-1]) < NEW_TOKENS:
                out = reference(torch.tensor([answers[-1][-1:]]), past_key_values=out.past_key_values, use_cache=True)
                answers[-1].append(int(out.logits[0, -1].argmax()))
    return Subject(decoder, reference, answers)


@pytest.fixture(scope="module", params=MODELS)
def exact(request: pytest.FixtureRequest) -> Subject:
    return load(request.param, torch.float32)


def answer(
    subject: Subject, *, alone: bool, chunked: bool, hit: bool, preempted: bool, graphs: bool = False
) -> list[list[int]]:
    """The prompts' outputs through an engine of this kind; checks that what was asked for did happen."""
    chunk = 7 if chunked else 128
    limits = SchedulerConfig(max_batch_tokens=3 * chunk + 5, max_chunk_tokens=chunk, max_running=4)
    groups = [[prompt] for prompt in PROMPTS] if alone else [PROMPTS]
    outputs: list[list[int]] = []
    for group in groups:
        # room to begin, not to end; prompts that hit share the blocks of what they have in common
        shared = SHARED_BLOCKS if hit and not alone else 0
        num_blocks = sum(len(prompt) // BLOCK_SIZE + 1 for prompt in group) + 2 - shared if preempted else NUM_BLOCKS
        scheduler = Scheduler(BlockPool(num_blocks, BLOCK_SIZE), limits)
        outputs += _answer_group(subject, subject.runner(graphs), scheduler, group, hit, preempted)
        scheduler.check_integrity()
    return outputs


def _answer_group(
    subject: Subject, runner: Any, scheduler: Scheduler, group: list[list[int]], hit: bool, preempted: bool
) -> list[list[int]]:
    kind = OverlappedEngine if ON_GPU else Engine
    engine: Any = kind(runner, scheduler, runner.kv, "model", subject.decoder.config.vocab_size)
    root, numbers = chain_root("model", b"tenant"), itertools.count()

    def request(prompt: list[int], num_tokens: int = NEW_TOKENS, priority: int = 0) -> Request:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        return Request(f"r{next(numbers)}", list(prompt), root, params, priority=priority)

    if hit:
        for prompt in group:
            engine.generate([request(prompt, 1)])
    requests = [request(prompt) for prompt in group]
    strong = [request([3, 5], 20, priority=-1)] if preempted else []  # grows at the expense of the others
    outputs = engine.generate([*requests, *strong])[: len(group)]
    assert bool(scheduler.num_preemptions) is preempted
    if not preempted:
        cached = [one.num_cached_tokens for one in requests]
        assert not hit or cached == [(len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in group]
        assert hit or cached[0] == 0
    return outputs  # type: ignore[no-any-return]


@pytest.mark.parametrize("graphs", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize("preempted", [False, True])
@pytest.mark.parametrize("hit", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_float32_output_is_that_of_transformers(
    exact: Subject, alone: bool, chunked: bool, hit: bool, preempted: bool, graphs: bool
) -> None:
    got = answer(exact, alone=alone, chunked=chunked, hit=hit, preempted=preempted, graphs=graphs)
    assert got == exact.answers


@pytest.mark.parametrize("graphs", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize("alone", [False, True])
def test_bfloat16_output_differs_only_where_the_reference_is_undecided(alone: bool, graphs: bool) -> None:
    subject = load(MODELS[0], torch.bfloat16)
    got = answer(subject, alone=alone, chunked=True, hit=False, preempted=False, graphs=graphs)
    for prompt, ours, theirs in zip(PROMPTS, got, subject.answers, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if first is None:
            continue
        with torch.inference_mode():
            logits = subject.reference(torch.tensor([prompt + theirs[:first]])).logits[0, -1]
        gap = float(logits[theirs[first]] - logits[ours[first]])
        assert gap <= 4 * BF16_STEP * float(logits.abs().max()), f"token {first} of {prompt[:4]}..."
