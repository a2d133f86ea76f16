"""Weight-only quantised products against float64 products with the very same rounded weights."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU, relative_error

from kernels import quant, reference  # isort: skip  (the interpreter switch comes first)

# float32: roundings of a sum; half types: the output is rounded once
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize(("rows", "out", "columns", "group"), [(1, 70, 96, 32), (5, 33, 512, 128), (67, 130, 128, 64)])
def test_products_equal_those_with_the_dequantised_weight(rows, out, columns, group, num_splits, bits):
    x = rand(rows, columns)
    weight = quant.quantise(rand(out, columns, seed=1), bits, group)
    wanted = x.double() @ reference.dequantised(weight.packed, weight.scales.double(), bits, group).T
    assert relative_error(quant.linear(x, weight, num_splits), wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if ON_GPU else [])])
def test_products_in_half_types_round_only_their_output(dtype, bits):
    x = rand(3, 256, dtype=dtype)
    weight = quant.quantise(rand(40, 256, seed=1), bits)
    wanted = x.double() @ reference.dequantised(weight.packed, weight.scales.double(), bits, 128).T
    assert relative_error(quant.linear(x, weight), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_within_half_a_step(bits):
    original = rand(9, 64)
    weight = quant.quantise(original, bits, 32)
    back = reference.dequantised(weight.packed, weight.scales.float(), bits, 32)
    # half a step, plus what a float16 scale cuts off the largest value
    top = 127 if bits == 8 else 7
    assert ((back - original).abs() <= weight.scales.float().repeat_interleave(32, 1) * (0.5 + top * 2**-11)).all()
    assert weight.shape == (9, 64)


def test_a_group_of_zeros_stays_zero():
    weight = quant.quantise(torch.zeros(4, 32, device=DEVICE), 4, 16)
    assert not quant.linear(rand(2, 32), weight).any()


@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 24), (8, 8), (4, 64)])
def test_impossible_formats_are_refused(bits, group):
    with pytest.raises(ValueError, match=r"bits|group size"):
        quant.quantise(rand(4, 96), bits, group)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="input columns"):
        quant.linear(rand(2, 48), quant.quantise(rand(4, 32), 8, 16))
