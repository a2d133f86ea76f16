"""Routing, grouping and the experts' products against float64, and the model family against Hugging Face's."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.kernel_device import DEVICE, ON_GPU, relative_error

from cloud.serving.models import qwen3_moe  # isort: skip  (the interpreter switch comes first)
from cloud.serving.models.decoder import LayerWeights
from cloud.serving.models.experts import ExpertsConfig, mix_experts
from cloud.serving.torch_backend import TorchBackend
from cloud.serving.weights import load_config, load_decoder
from kernels import moe, reference
from wire.errors import UnsupportedModelError

# two products in float32; half types round the inner activations, every pair's output and their sum
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("is_renormalised", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 2), (128, 8)])
def test_routing_matches_the_reference(num_experts, top_k, is_renormalised):
    logits = rand(7, num_experts)
    weights, experts = moe.route(logits, top_k, is_renormalised)
    wanted_weights, wanted_experts = reference.moe_routing(logits.double(), top_k, is_renormalised)
    assert relative_error(weights, wanted_weights) < 1e-6
    assert torch.equal(experts.long(), wanted_experts)


def test_equal_scores_choose_the_first_experts():
    _, experts = moe.route(torch.zeros(2, 6, device=DEVICE), 3, True)
    assert experts.tolist() == [[0, 1, 2]] * 2


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="top_k 5"):
        moe.route(rand(1, 4), 5, True)


@pytest.mark.parametrize("num_tokens", [1, 3, 700])
def test_grouping_is_a_stable_sort_by_expert(num_tokens, monkeypatch):
    monkeypatch.setattr(moe, "GROUP_BLOCK", 512)
    experts = torch.randint(0, 9, (num_tokens, 3), generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.int32)
    experts[experts == 4] = 5  # nobody chooses expert 4
    order, starts = moe.group(experts, 9)
    ordered, wanted = experts.flatten().sort(stable=True)
    assert torch.equal(order.long(), wanted)
    assert torch.equal(starts.long(), torch.searchsorted(ordered.long(), torch.arange(10, device=DEVICE)))


CASES = [(1, 4, 2, 32, 16), (7, 5, 3, 40, 24), (33, 3, 1, 64, 20), (19, 8, 8, 16, 32)]


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k", "hidden", "width"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])])
def test_experts_match_the_reference(num_tokens, num_experts, top_k, hidden, width, dtype):
    x = rand(num_tokens, hidden, dtype=dtype)
    gate_up = rand(num_experts, 2 * width, hidden, dtype=dtype, seed=1) * hidden**-0.5
    down = rand(num_experts, hidden, width, dtype=dtype, seed=2) * width**-0.5
    weights, experts = moe.route(rand(num_tokens, num_experts, seed=3), top_k, True)
    out = moe.experts_mlp(x, gate_up, down, weights, experts)
    wanted = reference.moe_mlp(x.double(), gate_up.double(), down.double(), weights.double(), experts)
    assert relative_error(out, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("tile", [moe.ProductTile(16, 16, 16, 4, 2), moe.ProductTile(32, 32, 64, 4, 2)])
@pytest.mark.parametrize("crowded", [False, True])
def test_experts_do_not_depend_on_the_tile_or_on_how_crowded_an_expert_is(tile, crowded):
    x, gate_up, down = rand(50, 24), rand(6, 36, 24, seed=1), rand(6, 24, 18, seed=2)
    logits = rand(50, 6, seed=3)
    if crowded:
        logits[:, 4] += 100.0
    weights, experts = moe.route(logits, 2, False)
    out = moe.experts_mlp(x, gate_up, down, weights, experts, tile)
    wanted = reference.moe_mlp(x.double(), gate_up.double(), down.double(), weights.double(), experts)
    assert relative_error(out, wanted) < TOLERANCE[torch.float32]


def test_the_plain_form_matches_the_reference():
    x, gate_up, down, router = rand(9, 24).cpu(), rand(6, 36, 24).cpu(), rand(6, 24, 18).cpu(), rand(6, 24).cpu()
    layer = LayerWeights(*[None] * 4, gate_up, down, router=router)
    got = mix_experts(x, layer, ExpertsConfig(6, 2, True), TorchBackend())
    routing = reference.moe_routing(x.double() @ router.double().T, 2, True)
    assert relative_error(got, reference.moe_mlp(x.double(), gate_up.double(), down.double(), *routing)) < 1e-6


def test_a_layer_without_experts_is_refused_with_the_remedy():
    with pytest.raises(UnsupportedModelError, match="mlp_only_layers"):
        qwen3_moe.config_from({"mlp_only_layers": [1]})


@pytest.mark.skipif(ON_GPU, reason="compares two CPU models")
def test_logits_equal_those_of_hugging_face(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from cloud.serving.backend import Batch, SequencePlan
    from cloud.serving.kv_pool import KvLayout, KvPool

    torch.manual_seed(0)
    settings = Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = Qwen3MoeForCausalLM(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    ours = load_decoder(tmp_path, config, TorchBackend(), torch.float32, 64)
    tokens = torch.randint(0, 61, (11,), generator=torch.Generator().manual_seed(1))
    kv = KvPool(KvLayout(2, 2, 16, 4, "float32"), 4)
    places = torch.arange(11)
    batch = ours.backend.plan(Batch(tokens, places, places, [SequencePlan([0, 1, 2], 11, 11)], places))
    with torch.inference_mode():
        got = ours.logits(ours.forward(batch, kv))
        wanted = theirs(tokens[None]).logits[0]
    assert relative_error(got, wanted) < 1e-5
