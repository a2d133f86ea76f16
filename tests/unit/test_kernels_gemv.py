"""Products of few rows with their fused surroundings, and tokens in and out, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU, poisoned, relative_error

from kernels import gemv, moe, reference, tokens  # isort: skip  (the interpreter switch comes first)

# float32 sums in another order; bfloat16 rounds the output, and the sum before an addition (the interpreter truncates).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
TYPES = [torch.float32, torch.bfloat16]


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 37, 576), (3, 8, 1000), (4, 130, 2048), (1, 600, 96)])
def test_a_plain_product_with_a_bias(rows, columns, depth, dtype):
    x, w, bias = rand(rows, depth, dtype=dtype), rand(columns, depth, dtype=dtype, seed=1), rand(columns, dtype=dtype)
    got = gemv.linear(x, w, poisoned(rows, columns, dtype=dtype), bias)
    assert relative_error(got, x.double() @ w.double().T + bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_normalised_input_and_a_gated_output(rows, dtype):
    x, w, norm = (
        rand(rows, 200, dtype=dtype),
        rand(2 * 45, 200, dtype=dtype, seed=1),
        1 + 0.1 * rand(200, dtype=dtype, seed=2),
    )
    got = gemv.linear(x, w, poisoned(rows, 45, dtype=dtype), norm=(norm, 1e-5), is_gated=True)
    both = reference.rms_norm(x.double(), norm.double(), 1e-5) @ w.double().T
    assert relative_error(got, reference.silu_mul(both)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_adding_keeps_what_the_residual_held(dtype):
    x, w, residual = rand(2, 300, dtype=dtype), rand(70, 300, dtype=dtype, seed=1), rand(2, 70, dtype=dtype, seed=2)
    wanted = residual.double() + x.double() @ w.double().T
    assert relative_error(gemv.linear(x, w, residual, adds=True), wanted) < TOLERANCE[dtype]


def test_more_rows_than_it_is_made_for_are_refused():
    with pytest.raises(ValueError, match="matrix product"):
        gemv.linear(rand(5, 16), rand(3, 16), poisoned(5, 3))


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 6, 3), (3, 4, 2)])
def test_experts_of_few_tokens_match_the_reference(num_tokens, num_experts, top_k):
    hidden, width = 72, 40
    x, norm = rand(num_tokens, hidden), 1 + 0.1 * rand(hidden, seed=3)
    gate_up, down = rand(num_experts, 2 * width, hidden, seed=1), rand(num_experts, hidden, width, seed=2)
    weights, experts = moe.route(rand(num_tokens, num_experts, seed=4), top_k, True)
    normed = reference.rms_norm(x.double(), norm.double(), 1e-6)
    wanted = x.double() + reference.moe_mlp(normed, gate_up.double(), down.double(), weights.double(), experts)
    assert relative_error(gemv.experts_mlp(x.clone(), gate_up, down, weights, experts, (norm, 1e-6)), wanted) < 2e-6


def test_embedding_takes_unknown_tokens_from_the_latest():
    table, latest = rand(11, 20), torch.tensor([7, 3, 9], dtype=torch.int32, device=DEVICE)
    ids = torch.tensor([4, -1, 0, -1], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([0, 2, 0, 1], dtype=torch.int32, device=DEVICE)
    assert torch.equal(tokens.embed(ids, rows, latest, table), table[[4, 9, 0, 3]])


@pytest.mark.parametrize("columns", [5, 4096, 9001])
def test_the_best_token_is_the_lowest_of_equals_and_lands_in_latest(columns):
    logits = rand(3, columns).round()  # many ties
    latest = torch.full((4,), -5, dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([2, 0, 3], dtype=torch.int32, device=DEVICE)
    got = tokens.pick_best(logits, rows, latest)
    wanted = [int((row == row.max()).nonzero()[0]) for row in logits.cpu()]
    assert got.tolist() == wanted
    assert latest.tolist() == [wanted[1], -5, wanted[0], wanted[2]]


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has one stream of launches and nothing to overlap")
def test_overlapping_launches_read_what_the_kernel_before_them_wrote():
    x, w = rand(1, 512, dtype=torch.bfloat16), rand(512, 512, dtype=torch.bfloat16, seed=1) * 512**-0.5
    wanted, got = x.clone(), x
    for _ in range(200):
        got = gemv.linear(got, w, torch.empty_like(got))
    for _ in range(200):
        wanted = gemv.linear(wanted, w, torch.empty_like(wanted))
        torch.cuda.synchronize()
    assert torch.equal(got, wanted)
