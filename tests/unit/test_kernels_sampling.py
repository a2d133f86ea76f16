"""Drawing on the device against the sampler of the CPU, which states what a draw is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU

from cloud.serving.backend import SamplingRow  # isort: skip  (the interpreter switch comes first)
from cloud.serving.request import SamplingParams
from cloud.serving.sampler import sample
from kernels import sampling
from kernels.noise import gumbel, philox

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
]


def on_device(logits: torch.Tensor, draws: list[sampling.Draw], counts: torch.Tensor | None = None) -> list[int]:
    packed = torch.from_numpy(sampling.pack(draws)).to(DEVICE)
    latest = torch.full((max(d.row for d in draws) + 1,), -1, dtype=torch.int32, device=DEVICE)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out = torch.empty(len(draws), dtype=torch.int32, device=DEVICE)
    sampling.draw(logits.to(DEVICE), packed, none if counts is None else counts, latest, out)
    assert [int(latest[d.row]) for d in draws] == out.tolist()
    return out.tolist()


def on_cpu(logits: torch.Tensor, number: int, **params: float) -> int:
    row = SamplingRow(SamplingParams(seed=5, **params), number, (), ())  # type: ignore[arg-type]
    return sample(logits[None].float(), [row])[0].token_id


def test_the_noise_has_the_published_words_of_philox_and_the_law_of_gumbel():
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]  # known answer of Random123 for key and counter 0
    assert philox(0, 0, 4).tolist() == words
    values = np.sort(gumbel(3, 1, 100_000).numpy())
    law = np.exp(-np.exp(-values))
    assert np.abs(law - (np.arange(100_000) + 0.5) / 100_000).max() < 0.005
    assert not np.array_equal(gumbel(1 << 40, 0, 8).numpy(), gumbel(0, 0, 8).numpy())


@pytest.mark.parametrize("num_columns", [5, 97, 4099, 50_001] if ON_GPU else [5, 4099])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_equal_those_of_the_cpu(num_columns, filters):
    generator = torch.Generator().manual_seed(num_columns)
    logits = torch.randn(4, num_columns + 3, generator=generator)[:, :num_columns] * 4
    numbers = range(4 if ON_GPU else 2)
    draws = [sampling.Draw(3 - i, 5, i, temperature=0.8, **filters) for i in numbers]
    assert on_device(logits[: len(draws)], draws) == [on_cpu(logits[i], i, temperature=0.8, **filters) for i in numbers]


def test_frequencies_follow_the_filtered_distribution():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    count = 4000
    if ON_GPU:
        draws = [sampling.Draw(i, 5, i, top_p=0.75) for i in range(count)]
        tokens = on_device(logits.expand(count, -1).contiguous(), draws)
    else:
        tokens = [on_cpu(logits, i, temperature=1.0, top_p=0.75) for i in range(count)]
    share = np.bincount(tokens, minlength=5) / count
    wanted = np.array([0.4, 0.3, 0.2, 0, 0]) / 0.9
    assert share[3:].sum() == 0
    assert np.abs(share - wanted).max() < 5 * math.sqrt(0.25 / count)


def test_ties_at_a_filter_are_all_kept_and_a_lone_token_is_always_drawn():
    flat = torch.zeros(16, 40)
    tokens = on_device(flat, [sampling.Draw(i, 2, i, top_k=1, top_p=0.01) for i in range(16)])
    assert len(set(tokens)) > 8
    lone = torch.full((2, 4500), -math.inf)
    lone[0, 4321] = lone[1, 17] = -1e4
    draws = [sampling.Draw(0, 0, 0, min_p=0.5, top_p=0.1), sampling.Draw(1, 0, 0, temperature=0.0)]
    assert on_device(lone, draws) == [4321, 17]


def test_penalties_and_their_counts_equal_those_of_the_cpu():
    logits = torch.randn(3, 120, generator=torch.Generator().manual_seed(1)) * 2
    prompt, output = [1, 5, 5, 9], [7, 5, 7]
    penalties = {"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.9}
    counts = torch.zeros(3, 120, dtype=torch.int32, device=DEVICE)
    for row in (0, 1):
        for token in prompt:
            counts[row, token] |= 1
        for token in output:
            counts[row, token] += 2
    penal = {"repetition": 1.7, "presence": 0.4, "frequency": 0.9, "is_penalised": True}
    draws = [
        sampling.Draw(0, 5, 3, temperature=0.0, **penal),
        sampling.Draw(1, 5, 3, temperature=1.2, **penal),
        sampling.Draw(2, 5, 3, temperature=1.2),
    ]
    before = counts.clone()
    tokens = on_device(logits, draws, counts)
    wanted = [
        sample(logits[i : i + 1], [SamplingRow(SamplingParams(seed=5, temperature=t, **p), 3, prompt, output)])[
            0
        ].token_id
        for i, (t, p) in enumerate([(0.0, penalties), (1.2, penalties), (1.2, {})])
    ]
    assert tokens == wanted
    raised = counts - before
    assert raised[0, tokens[0]] == raised[1, tokens[1]] == 2
    assert int(raised.abs().sum()) == 4
