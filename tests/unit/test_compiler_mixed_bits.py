"""Raising layers of a 4-bit graph to 8 bits: those and no others, with the 8-bit twin's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from compiler.mixed_bits import layers_by_bits, raise_to_eight_bits
from wire.errors import UnsupportedModelError

SIZE, BLOCK = 64, 32
LAYERS = ("/model/layers.0/attn/o_proj/MatMul", "/model/layers.0/mlp/down_proj/MatMul")


def _write(folder: Path, bits: int, weights: list[np.ndarray]) -> Path:
    """Two MatMulNBits in a row, symmetric, as the model builder names them."""
    folder.mkdir()
    nodes, initializers, value = [], [], "x"
    for name, weight in zip(LAYERS, weights, strict=True):
        blocks = weight.T.reshape(SIZE, SIZE // BLOCK, BLOCK)  # [N, blocks, block]
        scale = np.abs(blocks).max(-1) / (2 ** (bits - 1) - 1)
        packed = np.round(blocks / scale[..., None]).astype(np.int64) + 2 ** (bits - 1)
        data = packed.astype(np.uint8) if bits == 8 else (packed[..., ::2] | packed[..., 1::2] << 4).astype(np.uint8)
        stem = name.strip("/").replace("/", ".")
        initializers += [
            numpy_helper.from_array(data, f"{stem}.weight_Q{bits}"),
            numpy_helper.from_array(scale.astype(np.float32), f"{stem}.weight_scale"),
        ]
        attributes = {"K": SIZE, "N": SIZE, "bits": bits, "block_size": BLOCK}
        inputs = [value, f"{stem}.weight_Q{bits}", f"{stem}.weight_scale"]
        value = f"{name}/output_0"
        nodes.append(
            helper.make_node("MatMulNBits", inputs, [value], f"{name}_Q{bits}", domain="com.microsoft", **attributes)
        )
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "two layers",
        [helper.make_tensor_value_info("x", floats, [1, SIZE])],
        [helper.make_tensor_value_info(value, floats, [1, SIZE])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(folder / "model.onnx"))
    (folder / "genai_config.json").write_text("{}")
    return folder


@pytest.fixture
def weights() -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((2, SIZE, SIZE)).astype(np.float32))


def _error(folder: Path, weights: list[np.ndarray]) -> float:
    x = np.random.default_rng(1).standard_normal((1, SIZE)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return float(np.abs(session.run(None, {"x": x})[0] - x @ weights[0] @ weights[1]).mean())


def test_only_the_named_layers_get_8_bits_and_the_error_falls(tmp_path: Path, weights: list[np.ndarray]) -> None:
    four, eight = _write(tmp_path / "4", 4, weights), _write(tmp_path / "8", 8, weights)
    raise_to_eight_bits(four, eight, LAYERS[:1], tmp_path / "one")
    raise_to_eight_bits(four, eight, LAYERS, tmp_path / "both")
    assert layers_by_bits(tmp_path / "one") == {LAYERS[0]: 8, LAYERS[1]: 4}
    assert layers_by_bits(tmp_path / "both") == {LAYERS[0]: 8, LAYERS[1]: 8}
    assert _error(four, weights) > _error(tmp_path / "one", weights) > _error(tmp_path / "both", weights)
    assert _error(tmp_path / "both", weights) == pytest.approx(_error(eight, weights))
    assert (tmp_path / "one" / "genai_config.json").exists()


def test_no_layer_named_leaves_the_answers_as_they_are(tmp_path: Path, weights: list[np.ndarray]) -> None:
    four, eight = _write(tmp_path / "4", 4, weights), _write(tmp_path / "8", 8, weights)
    raise_to_eight_bits(four, eight, (), tmp_path / "none")
    assert _error(tmp_path / "none", weights) == _error(four, weights)


def test_a_layer_that_is_not_there_is_named(tmp_path: Path, weights: list[np.ndarray]) -> None:
    four, eight = _write(tmp_path / "4", 4, weights), _write(tmp_path / "8", 8, weights)
    with pytest.raises(UnsupportedModelError, match=r"layers\.9"):
        raise_to_eight_bits(four, eight, ("/model/layers.9/attn/o_proj/MatMul",), tmp_path / "out")
