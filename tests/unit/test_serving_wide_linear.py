"""Widened products against float64, at shapes that do not fill a tile."""

from __future__ import annotations

import pytest
import torch

from cloud.serving.torch_backend import TorchBackend
from cloud.serving.wide_linear import TILE_ROWS, wide_linear

SHAPES = [(2, 3, 5), (8, TILE_ROWS, 64), (3, TILE_ROWS + 1, 33), (17, 3 * TILE_ROWS - 7, 48)]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_rows", "num_outputs", "width"), SHAPES)
def test_a_widened_product_is_the_exact_one_rounded_once(
    num_rows: int, num_outputs: int, width: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x, weight, bias = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((num_rows, width), (num_outputs, width), (num_outputs,))
    )
    exact = x.double() @ weight.double().T
    if has_bias:
        exact += bias.double()
    got = wide_linear(x, weight, bias if has_bias else None)
    assert got.dtype == torch.bfloat16
    # half a unit in the last of 8 bits, and what float32 sums lose near zero
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)


def test_only_many_bfloat16_rows_are_widened() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 16, generator=generator)
    x = torch.randn(4, 16, generator=generator)
    backend = TorchBackend(is_widening=True)
    assert torch.equal(backend.linear(x, weight), torch.nn.functional.linear(x, weight))
    half = weight.bfloat16()
    assert backend.linear(x[:0].bfloat16(), half).shape == (0, 7)
    assert torch.equal(backend.linear(x.bfloat16(), half), wide_linear(x.bfloat16(), half))


@pytest.mark.parametrize("has_bias", [False, True])
def test_one_row_is_the_exact_product_rounded(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 96), (40, 96), (40,)))
    exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    got = TorchBackend(is_widening=True).linear(x, weight, bias if has_bias else None)
    # half a unit in the last of 8 bits of the product and of the sum
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2**-8 * float(exact.abs().max()))
