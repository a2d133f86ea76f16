"""Packed products against float64 products of the rounded weights, and an engine that runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cloud.serving.engine import EngineConfig, build_engine
from cloud.serving.packed_linear import MANY_ROWS, pack, packed_linear
from cloud.serving.request import Request, SamplingParams
from cloud.serving.wide_linear import TILE_ROWS
from wire.errors import InvalidInputError, UnsupportedModelError

SHAPES = [(1, 64, 96), (5, 16, 32), (MANY_ROWS, TILE_ROWS + 48, 64), (40, 48, 160)]


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """What is left of a weight, computed here once more."""
    groups = weight.double().view(weight.shape[0], -1, group)
    top = 127 if bits == 8 else 7
    steps = groups.abs().amax(dim=-1, keepdim=True) / top
    used = steps if bits == 8 else steps.bfloat16().double()
    values = (groups / used).round().clamp(-top, top)
    return (values * steps.bfloat16().double()).view_as(weight)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("num_rows", "num_outputs", "width"), SHAPES)
def test_a_packed_product_is_that_of_the_rounded_weight(
    num_rows: int, num_outputs: int, width: int, bits: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((num_rows, width), (num_outputs,)))
    weight = torch.randn(num_outputs, width, generator=generator).bfloat16()
    packed = pack(weight, bits)
    exact = x.double() @ rounded(weight, bits, packed.group_size).T + (bias.double() if has_bias else 0)
    got = packed_linear(x, packed, bias if has_bias else None)
    assert got.shape == exact.shape
    assert ((got.double() - exact).norm() / exact.norm()).item() < 2**-7
    assert packed.nbytes < weight.nbytes * (0.63 if bits == 8 else 0.45)


def test_shapes_without_a_4_bit_form_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="7 x 64 has no 4-bit form"):
        pack(torch.randn(7, 64), 4)


def test_an_engine_on_packed_weights_stays_near_the_whole_ones(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=80, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    prompt = [5, 17, 3, 60, 41]
    answers, roots = {}, set()
    for bits in (16, 8, 4):
        engine = build_engine(EngineConfig(tmp_path, dtype="bfloat16", num_blocks=16, block_size=8, weight_bits=bits))
        params = SamplingParams(max_tokens=1, ignore_eos=True, num_logprobs=20)
        request = Request("r", list(prompt), engine.root(b""), params)
        engine.scheduler.add(request)
        answers[bits] = dict(engine.step()[0].token.top_logprobs)  # type: ignore[union-attr]
        roots.add(engine.root(b""))
    assert len(roots) == 3  # no cache is shared between them
    for bits, limit in ((8, 0.1), (4, 1.0)):
        shared = answers[16].keys() & answers[bits].keys()
        assert len(shared) >= 10
        assert max(abs(answers[16][token] - answers[bits][token]) for token in shared) < limit


def test_impossible_combinations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="weight_bits is 5"):
        build_engine(EngineConfig(tmp_path, weight_bits=5))
    with pytest.raises(InvalidInputError, match="4-bit weights with dtype float32"):
        build_engine(EngineConfig(tmp_path, dtype="float32", weight_bits=4))
