"""Seeded faults in really compiled artefacts, and artefacts that are merely different: what the gates see of both.

A fault takes a good artefact's graph (or folder) and breaks it as a wrong tool, recipe or copy would. Each is a pure
edit of the ONNX file, so the harness judges the very bytes that would be published.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Edit = Callable[[Any], None]


def edited(source: Path, out: Path, edit: Edit) -> Path:
    """The graph `source` after `edit`, written to `out` with its weights inside."""
    model = onnx.load(str(source))
    edit(model.graph)
    onnx.save(model, str(out))
    return out


def edited_folder(source: Path, out: Path, edit: Edit) -> Path:
    """The language artefact `source` with an edited graph, in the new folder `out`."""
    out.mkdir()
    for file in source.iterdir():
        if not file.name.startswith("model.onnx"):
            shutil.copyfile(file, out / file.name)
    edited(source / "model.onnx", out / "model.onnx", edit)
    return out


# edits of any graph


def change(matches: Callable[[str], bool], make: Callable[[Any], Any], *, at: int = 0, count: int = 1) -> Edit:
    """Replace initialisers whose name `matches`: `make(array)` gives the new values of `count` of them from `at` on."""

    def edit(graph: Any) -> None:
        chosen = [tensor for tensor in graph.initializer if matches(tensor.name)][at : at + count if count else None]
        assert chosen, "the fault finds nothing to break"
        for tensor in chosen:
            old = numpy_helper.to_array(tensor)
            new = np.asarray(make(old.copy()), old.dtype).reshape(old.shape)
            assert not np.array_equal(old, new, equal_nan=True), f"the fault leaves {tensor.name} as it was"
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))

    return edit


def before_output(kind: str, extra: Callable[[], list[Any]] = list, **attributes: Any) -> Edit:
    """Put a node before the graph's first output: `kind`(value, *constants)."""

    def edit(graph: Any) -> None:
        name = graph.output[0].name
        _rename_output(graph, name, "before.fault")
        constants = extra()
        graph.initializer.extend(constants)
        inputs = ["before.fault", *(constant.name for constant in constants)]
        graph.node.append(helper.make_node(kind, inputs, [name], name="fault", **attributes))

    return edit


def after_input(nodes: Callable[[str, str], tuple[list[Any], list[Any]]]) -> Edit:
    """Put nodes between the graph's first input and all that reads it; `nodes(input, changed)` gives them."""

    def edit(graph: Any) -> None:
        name = graph.input[0].name
        for node in graph.node:
            node.input[:] = ["after.fault" if value == name else value for value in node.input]
        made, constants = nodes(name, "after.fault")
        graph.initializer.extend(constants)
        for node in reversed(made):
            graph.node.insert(0, node)

    return edit


def bypass(op_type: str, *, at: int = 0, same_as: int = 0) -> Edit:
    """Drop the `at`-th node of a kind: what reads its output reads its input number `same_as` instead."""

    def edit(graph: Any) -> None:
        node = [one for one in graph.node if one.op_type == op_type][at]
        dropped, kept = node.output[0], node.input[same_as]
        graph.node.remove(node)
        for other in graph.node:
            other.input[:] = [kept if value == dropped else value for value in other.input]

    return edit


def set_attribute(op_type: str, name: str, value: Callable[[Any], Any]) -> Edit:
    """Change an attribute of every node of a kind."""

    def edit(graph: Any) -> None:
        for node in graph.node:
            if node.op_type == op_type:
                found = {one.name: helper.get_attribute_value(one) for one in node.attribute}
                found[name] = value(found[name])
                del node.attribute[:]
                node.attribute.extend(helper.make_attribute(key, one) for key, one in found.items())

    return edit


def constant(name: str, values: Any, dtype: Any = np.float32) -> Any:
    """An initialiser."""
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def _rename_output(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        node.output[:] = [new if value == old else value for value in node.output]
        node.input[:] = [new if value == old else value for value in node.input]


def _is_weight(name: str) -> bool:
    return name.endswith("_quantized") and "bias" not in name


def _is_scale(name: str) -> bool:
    return name.endswith("_scale")


def _roll(array: Any) -> Any:
    return np.roll(array.reshape(-1), array.size // 3)


def _shuffled(seed: int) -> Any:
    return np.random.default_rng(seed).permutation(1000)


def _swap_channels(name: str, changed: str) -> tuple[list[Any], list[Any]]:
    order = constant("bgr", [2, 1, 0], np.int64)
    return [helper.make_node("Gather", [name, "bgr"], [changed], axis=1)], [order]


def _swap_axes(name: str, changed: str) -> tuple[list[Any], list[Any]]:
    return [helper.make_node("Transpose", [name], [changed], perm=[0, 1, 3, 2])], []


def _rescale(factor: float, shift: float) -> Callable[[str, str], tuple[list[Any], list[Any]]]:
    def nodes(name: str, changed: str) -> tuple[list[Any], list[Any]]:
        made = [helper.make_node("Mul", [name, "f"], ["f.out"]), helper.make_node("Add", ["f.out", "s"], [changed])]
        return made, [constant("f", factor), constant("s", shift)]

    return nodes


def _largest(array: Any, value: float) -> Any:
    array.reshape(-1)[int(np.abs(array).argmax())] = value
    return array


def _adds_layer_ten(name: str) -> bool:
    """The scales of the two projections by which the tenth block adds to what passes through."""
    return name in (f"model.layers.10.{part}.MatMul.weight_scale" for part in ("attn.o_proj", "mlp.down_proj"))


VISION: dict[str, Edit] = {
    "scale x2 of the output": before_output("Mul", lambda: [constant("two", 2.0)]),
    "sign of the output": before_output("Neg"),
    "swapped labels": before_output("Gather", lambda: [constant("order", _shuffled(1), np.int64)], axis=1),
    "labels off by one": before_output(
        "Gather", lambda: [constant("order", np.roll(np.arange(1000), 1), np.int64)], axis=1
    ),
    "channels swapped": after_input(_swap_channels),
    "swapped axis of the image": after_input(_swap_axes),
    "pixels not normalised": after_input(_rescale(0.225, 0.45)),
    "normalised twice": after_input(_rescale(1 / 0.225, -2.0)),
    "scale x2 of one layer's weights": change(lambda n: n.endswith("weight_scale"), lambda a: 2 * a, at=20),
    "scales of all weights x1.1": change(lambda n: n.endswith("weight_scale"), lambda a: 1.1 * a, count=0),
    "wrong zero point": change(lambda n: n.endswith("_zero_point") and "weight" not in n, lambda a: a + 96, at=12),
    "zero points of five values": change(
        lambda n: n.endswith("_zero_point") and "weight" not in n, lambda a: a + 64, at=20, count=5
    ),
    "stale range of one layer": change(lambda n: _is_scale(n) and "weight" not in n, lambda a: a / 8, at=9),
    "weights of one layer shifted": change(_is_weight, _roll, at=15),
    "weights of a layer in the wrong order": change(_is_weight, lambda a: a.reshape(-1, *a.shape[1:])[::-1], at=24),
    "weights of one layer zero": change(_is_weight, np.zeros_like, at=30),
    "bits flipped in one layer": change(_is_weight, lambda a: a ^ 64, at=10),
    "bias sign": change(lambda n: n.endswith(("_bias", "_bias_quantized")), lambda a: -a, at=8, count=3),
    "NaN weights": change(_is_scale, lambda a: np.full_like(a, np.nan), at=40),
    "one infinite scale": change(lambda n: n.endswith("weight_scale"), lambda a: _largest(a, np.inf), at=25),
    "classifier's weights of another model": change(
        lambda n: "classifier" in n and n.endswith("weight_quantized"), lambda a: a[::-1]
    ),
    "a skip connection dropped": bypass("Add", at=4),
    "an activation dropped": bypass("Clip", at=0),
}

LANGUAGE: dict[str, Edit] = {
    "logits x2": before_output("Mul", lambda: [constant("two", 2.0)]),
    "logits of the neighbour token": before_output(
        "Gather", lambda: [constant("order", np.roll(np.arange(49152), 1), np.int64)], axis=2
    ),
    "wrong rope theta": change(
        lambda n: n in ("cos_cache", "sin_cache"), lambda a: a[np.arange(len(a)) * 3 // 4], count=2
    ),
    "positions off by one in the tables": change(lambda n: n == "sin_cache", lambda a: np.roll(a, 1, axis=0)),
    "rope interleaved": set_attribute("GroupQueryAttention", "rotary_interleaved", lambda value: 1),
    "no rotary embedding": set_attribute("GroupQueryAttention", "do_rotary", lambda value: 0),
    "wrong attention scale": set_attribute("GroupQueryAttention", "scale", lambda value: 0.3),
    "KV cut to a window": set_attribute("GroupQueryAttention", "local_window_size", lambda value: 8),
    "a layer dropped": change(_adds_layer_ten, np.zeros_like, count=2),
    "a gate's activation dropped": bypass("Sigmoid", at=12),
    "NaN in a norm": change(lambda n: n.endswith("layernorm.weight"), lambda a: np.full_like(a, np.nan), at=17),
    "norm weights of another layer": change(
        lambda n: n.endswith("layernorm.weight"), lambda a: 3.0 * a, at=40, count=6
    ),
    "wrong zero points": change(lambda n: n.endswith("weight_zp"), lambda a: a ^ 0x44, at=10, count=8),
    "stale scales": change(lambda n: n.endswith("weight_scale"), _roll, at=33, count=4),
    "fp16 overflow in a scale": change(lambda n: n.endswith("weight_scale"), lambda a: _largest(a, np.inf), at=50),
    "packed weights shifted": change(lambda n: "weight_Q" in n, _roll, at=60),
}


def wrong_tokenizer(source: Path, out: Path) -> Path:
    """A folder whose tokenizer splits numbers in groups: the right vocabulary, the wrong cuts."""
    shutil.copytree(source, out)
    document = json.loads((out / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"] = [
        one for one in document["pre_tokenizer"]["pretokenizers"] if one["type"] != "Digits"
    ]
    document["model"]["merges"] = document["model"]["merges"][:-2000]
    (out / "tokenizer.json").write_text(json.dumps(document))
    return out


def cut_weights(source: Path, out: Path) -> Path:
    """A folder whose weights file lost its last part, as by a copy that broke off."""
    shutil.copytree(source, out)
    weights = out / "model.onnx.data"
    with weights.open("rb+") as file:
        file.truncate(weights.stat().st_size - (1 << 20))
    return out
