"""Small real models for the compiler's tests: a convolutional classifier as ONNX, a Llama as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 10


def write_classifier(path: Path, *, seed: int = 0) -> Path:
    """Images [batch, 3, 32, 32] to logits [batch, 10]: two convolutions, pooling, a linear head."""
    random = np.random.default_rng(seed)
    weights = {
        "w1": random.standard_normal((16, 3, 3, 3)) * 0.3,
        "w2": random.standard_normal((32, 16, 3, 3)) * 0.1,
        "wh": random.standard_normal((32, CLASSES)) * 3.0,
        "bh": random.standard_normal(CLASSES) * 0.1,
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="second", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "wh", "bh"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def permute(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """The row order that llama.cpp's converter gives queries and keys (its own formula, the inverse of ours)."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_llama_gguf(
    path: Path, *, architecture: str = "llama", pre: str = "smollm"
) -> dict[str, np.ndarray[Any, Any]]:
    """A one-layer Llama as GGUF; returns its tensors under their Hugging Face names, as they must come back."""
    hidden, heads, kv_heads, inner, vocab = 64, 4, 2, 96, 260
    random = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        values = random.standard_normal(shape).astype(np.float32)
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # exact in bfloat16

    layer = "model.layers.0"
    expected = {
        "model.embed_tokens.weight": draw(vocab, hidden),
        "model.norm.weight": draw(hidden),
        f"{layer}.input_layernorm.weight": draw(hidden),
        f"{layer}.post_attention_layernorm.weight": draw(hidden),
        f"{layer}.self_attn.q_proj.weight": draw(hidden, hidden),
        f"{layer}.self_attn.k_proj.weight": draw(hidden // 2, hidden),
        f"{layer}.self_attn.v_proj.weight": draw(hidden // 2, hidden),
        f"{layer}.self_attn.o_proj.weight": draw(hidden, hidden),
        f"{layer}.mlp.gate_proj.weight": draw(inner, hidden),
        f"{layer}.mlp.up_proj.weight": draw(inner, hidden),
        f"{layer}.mlp.down_proj.weight": draw(hidden, inner),
    }
    names = ("token_embd", "output_norm", "blk.0.attn_norm", "blk.0.ffn_norm", "blk.0.attn_q", "blk.0.attn_k")
    names += ("blk.0.attn_v", "blk.0.attn_output", "blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down")
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer, vocab, pre)
    for name, (key, tensor) in zip(names, expected.items(), strict=True):
        stored = tensor
        if "q_proj" in key or "k_proj" in key:
            stored = permute(tensor, heads if "q_proj" in key else kv_heads)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int, pre: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "ll", "hell"][:vocab]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
