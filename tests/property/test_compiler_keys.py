"""Build keys tell apart what must be built apart and nothing else, over generated changes of all that decides a build.

No build runs here. A change is made to a small graph, a folder, a recipe, a target or a tool's version together with
what it ought to do: change the key of a stage (else it is a false hit) or leave it (else a false miss).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from compiler.cache import Stage
from compiler.fingerprint import fingerprint_folder, fingerprint_onnx
from compiler.options import builder_options
from compiler.recipe import Recipe, parse_recipe
from compiler.targets import Target, load_targets
from tests.fakes.compiler_models import write_classifier

NUM_MUTATIONS = 500


@dataclass(frozen=True)
class Outcome:
    """What a mutation did and what it should have done."""

    what: str
    is_changed: bool
    should_change: bool


# models as ONNX


def _graph_mutations(random_: random.Random) -> list[tuple[str, Callable[[Any], None], bool]]:
    weight = random_.choice(["w1", "w2", "wh", "bh"])
    node = random_.randrange(7)
    return [
        ("one weight differs by one bit", lambda model: _flip_bit(model, weight, random_), True),
        ("two values of a weight change places", lambda model: _swap_values(model, weight, random_), True),
        ("a weight is scaled", lambda model: _scale(model, weight, random_.uniform(1.01, 3)), True),
        ("a weight's type", lambda model: _retype(model, weight), True),
        ("a stride", lambda model: _set_attribute(model, "second", "strides", [1, 1]), True),
        ("a padding", lambda model: _set_attribute(model, "first", "pads", [0, 0, 2, 2]), True),
        ("an operator", lambda model: _set_operator(model, "relu2", "Sigmoid"), True),
        ("an edge skips a node", lambda model: _rewire(model, "second", 0, "c1"), True),
        ("the output's name", lambda model: _rename(model, "logits", "scores"), True),
        ("the input's name", lambda model: _rename(model, "image", "picture"), True),
        ("the input's size", lambda model: _set_height(model, 30), True),
        ("the operator set", lambda model: setattr(model.opset_import[0], "version", 16), True),
        ("a node's name", lambda model: setattr(model.graph.node[node], "name", f"n{random_.random()}"), False),
        ("an inner value's name", lambda model: _rename(model, "c1", f"v{random_.random()}"), False),
        ("a weight's name", lambda model: _rename(model, weight, f"w{random_.random()}"), False),
        ("documentation", lambda model: setattr(model.graph.node[node], "doc_string", f"{random_.random()}"), False),
        ("the graph's name", lambda model: setattr(model.graph, "name", f"g{random_.random()}"), False),
        ("the producer", lambda model: setattr(model, "producer_name", f"p{random_.random()}"), False),
        ("free text", lambda model: helper.set_model_props(model, {"note": str(random_.random())}), False),
        ("the order of weights", lambda model: _shuffle(model.graph.initializer, random_), False),
        ("the order of nodes", lambda model: _shuffle(model.graph.node, random_), False),
        ("a node that nobody uses", lambda model: _add_dead_node(model, random_), False),
        ("a weight that nobody uses", lambda model: _add_dead_weight(model, random_), False),
        ("how a weight is stored", lambda model: _store_typed(model, weight), False),
    ]


def _initial(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _replace(model: Any, name: str, array: np.ndarray[Any, Any]) -> None:
    _initial(model, name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def _flip_bit(model: Any, name: str, random_: random.Random) -> None:
    array = numpy_helper.to_array(_initial(model, name)).copy()
    array.reshape(-1).view(np.uint32)[random_.randrange(array.size)] ^= np.uint32(1)
    _replace(model, name, array)


def _swap_values(model: Any, name: str, random_: random.Random) -> None:
    array = numpy_helper.to_array(_initial(model, name)).copy()
    flat = array.reshape(-1)
    one, other = random_.sample(range(flat.size), 2)
    flat[one], flat[other] = flat[other], flat[one]
    _replace(model, name, array)


def _scale(model: Any, name: str, factor: float) -> None:
    _replace(model, name, (numpy_helper.to_array(_initial(model, name)) * factor).astype(np.float32))


def _retype(model: Any, name: str) -> None:
    _replace(model, name, numpy_helper.to_array(_initial(model, name)).astype(np.float64))


def _store_typed(model: Any, name: str) -> None:
    array = numpy_helper.to_array(_initial(model, name))
    typed = helper.make_tensor(name, onnx.TensorProto.FLOAT, array.shape, array.reshape(-1).tolist())
    _initial(model, name).CopyFrom(typed)


def _node(model: Any, name: str) -> Any:
    return next(node for node in model.graph.node if node.name == name)


def _set_attribute(model: Any, node: str, name: str, value: Any) -> None:
    kept = [attribute for attribute in _node(model, node).attribute if attribute.name != name]
    del _node(model, node).attribute[:]
    _node(model, node).attribute.extend([*kept, helper.make_attribute(name, value)])


def _set_operator(model: Any, node: str, kind: str) -> None:
    _node(model, node).op_type = kind


def _rewire(model: Any, node: str, place: int, value: str) -> None:
    _node(model, node).input[place] = value


def _rename(model: Any, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for entry in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        entry.name = new if entry.name == old else entry.name


def _set_height(model: Any, size: int) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = size


def _shuffle(entries: Any, random_: random.Random) -> None:
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
    random_.shuffle(copies)
    del entries[:]
    entries.extend(copies)


def _add_dead_node(model: Any, random_: random.Random) -> None:
    model.graph.node.append(helper.make_node("Relu", ["c1"], [f"dead{random_.random()}"]))


def _add_dead_weight(model: Any, random_: random.Random) -> None:
    array = np.array([random_.random()], np.float32)
    model.graph.initializer.append(numpy_helper.from_array(array, f"dead{random_.random()}"))


def _graph_outcomes(folder: Path, random_: random.Random) -> Iterator[Outcome]:
    original = onnx.load(str(write_classifier(folder / "original.onnx")))
    before = fingerprint_onnx(folder / "original.onnx").digest
    while True:
        for what, mutate, should_change in _graph_mutations(random_):
            model = onnx.ModelProto.FromString(original.SerializeToString())
            mutate(model)
            onnx.save(model, str(folder / "mutated.onnx"))
            yield Outcome(what, fingerprint_onnx(folder / "mutated.onnx").digest != before, should_change)


# models as folders

_TENSORS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.weight": np.ones((2, 2), np.float32)}
_CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "hidden_size": 4}


def _write_folder(folder: Path, files: dict[str, dict[str, Any]], config: dict[str, Any], tokenizer: str) -> Path:
    folder.mkdir()
    for name, tensors in files.items():
        save_file(tensors, str(folder / name))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def _folder_outcomes(folder: Path, random_: random.Random) -> Iterator[Outcome]:
    tokenizer = json.dumps({"model": {"vocab": {"a": 0, "b": 1}}})
    count = 0

    def digest(files: dict[str, dict[str, Any]], config: dict[str, Any], text: str, readme: str = "") -> str:
        nonlocal count
        count += 1
        made = _write_folder(folder / f"model{count}", files, config, text)
        (made / "README.md").write_text(readme)
        return fingerprint_folder(made).digest

    whole = {"model.safetensors": _TENSORS}
    before = digest(whole, _CONFIG, tokenizer)
    while True:
        changed = {name: array.copy() for name, array in _TENSORS.items()}
        changed["a.weight"].reshape(-1)[random_.randrange(12)] += 1 + random_.random()
        reshaped = _TENSORS | {"a.weight": _TENSORS["a.weight"].reshape(4, 3)}
        renamed = {"c.weight": _TENSORS["a.weight"], "b.weight": _TENSORS["b.weight"]}
        split = {f"{name[0]}.safetensors": {name: array} for name, array in _TENSORS.items()}
        shuffled = dict(random_.sample(list(_CONFIG.items()), len(_CONFIG)))
        theta = _CONFIG | {"rope_theta": random_.uniform(1, 9999)}
        words = json.dumps({"model": {"vocab": {"a": 1, "b": 0}}})
        cases = [
            ("a value of a tensor", ({"model.safetensors": changed}, _CONFIG, tokenizer), True),
            ("a tensor's shape", ({"model.safetensors": reshaped}, _CONFIG, tokenizer), True),
            ("a tensor's name", ({"model.safetensors": renamed}, _CONFIG, tokenizer), True),
            ("a number in the configuration", (whole, theta, tokenizer), True),
            ("the tokenizer", (whole, _CONFIG, words), True),
            ("tensors in two files", (split, _CONFIG, tokenizer), False),
            ("the order in the configuration", (whole, shuffled, tokenizer), False),
            ("who saved it", (whole, _CONFIG | {"transformers_version": str(random_.random())}, tokenizer), False),
            ("white space in the tokenizer", (whole, _CONFIG, json.dumps(json.loads(tokenizer), indent=3)), False),
            ("the read-me", (whole, _CONFIG, tokenizer, str(random_.random())), False),
        ]
        for what, arguments, should_change in cases:
            yield Outcome(what, digest(*arguments) != before, should_change)


# recipes, targets and tools: the stages' own inputs


def _language_inputs(recipe: Recipe, target: Target) -> dict[str, Any]:
    filled = recipe.filled(target).language
    return {
        "precision": filled.precision,
        "provider": target.language.provider,
        "options": builder_options(filled),
    }


def _recipe_outcomes(random_: random.Random) -> Iterator[Outcome]:
    targets = load_targets("all")
    while True:
        target = random_.choice(targets)
        before = _language_inputs(parse_recipe({}), target)
        is_int4 = target.language.precision == "int4"
        for what, document, should_change in [
            ("another precision", {"precision": "int8"}, before["precision"] != "int8"),
            ("another algorithm", {"algorithm": random_.choice(["rtn", "k_quant", "default"])}, is_int4),
            ("a builder option", {"builder_options": {"block_size": random_.choice([16, 64, 128])}}, is_int4),
            ("a limit", {"max_kl": random_.random()}, False),
            ("another limit", {"max_perplexity_ratio": 1 + random_.random()}, False),
            ("the context", {"context_tokens": random_.randrange(128, 9999)}, False),
            ("the text of the gates", {"gate_tokens": random_.randrange(128, 9999)}, False),
            ("the target's own precision", {"precision": target.language.precision}, False),
        ]:
            found = _language_inputs(parse_recipe({"language": document}), target)
            yield Outcome(f"{what} for {target.name}", _key(found) != _key(before), should_change)
        other = random_.choice(targets)
        same = other.language == target.language
        found = _language_inputs(parse_recipe({}), other)
        yield Outcome(f"{target.name} or {other.name}", _key(found) != _key(before), not same)


def _tool_outcomes(random_: random.Random) -> Iterator[Outcome]:
    tools = ("onnx", "onnxruntime")
    versions = {"onnx": "1.0", "onnxruntime": "1.0", "torch": "1.0", "gguf": "1.0"}
    before = _key({"x": 1}, tools, versions)
    while True:
        changed = random_.choice(list(versions))
        found = _key({"x": 1}, tools, versions | {changed: f"1.{random_.randrange(1, 99)}"})
        yield Outcome(f"the version of {changed}", found != before, changed in tools)


def _key(
    inputs: dict[str, Any], tools: tuple[str, ...] = (), versions: Mapping[str, str] = MappingProxyType({})
) -> str:
    return Stage("genai", inputs, tools, _never).key(versions)


def _never(folder: Path) -> None:
    raise AssertionError("keys only")


def test_generated_changes_hit_and_miss_the_cache_as_they_should(tmp_path: Path) -> None:
    random_ = random.Random(20261125)
    sources = [
        _graph_outcomes(tmp_path, random_),
        _folder_outcomes(tmp_path, random_),
        _recipe_outcomes(random_),
        _tool_outcomes(random_),
    ]
    outcomes = [next(sources[number % len(sources)]) for number in range(NUM_MUTATIONS)]
    false_hits = {o.what for o in outcomes if o.should_change and not o.is_changed}
    false_misses = {o.what for o in outcomes if o.is_changed and not o.should_change}
    assert len(outcomes) == NUM_MUTATIONS
    assert sum(o.should_change for o in outcomes) > NUM_MUTATIONS // 4
    assert (false_hits, false_misses) == (set(), set())


def test_inner_graphs_count_and_their_names_do_not(tmp_path: Path) -> None:
    digests = [fingerprint_onnx(_with_branch(tmp_path / f"{n}.onnx", *case)).digest for n, case in enumerate(
        [("Relu", "inner"), ("Relu", "other"), ("Sigmoid", "inner")]
    )]  # fmt: skip
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def _with_branch(path: Path, kind: str, name: str) -> Path:
    value = helper.make_tensor_value_info
    branch = helper.make_graph([helper.make_node(kind, ["x"], [name])], "b", [], [value(name, 1, None)])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["n"])], "c", [], [value("n", 1, None)])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=other)
    graph = helper.make_graph([node], "g", [value("x", 1, [2]), value("flag", 9, [])], [value("y", 1, [2])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(path))
    return path
