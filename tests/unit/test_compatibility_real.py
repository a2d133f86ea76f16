"""The resolver against the real runtimes of this machine: what it says will run is loaded and run, what it refuses is
tried too. Nothing here may load after being refused for its graph, and nothing may fail after being let through.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as native

from compiler.graph_facts import graph_facts
from compiler.targets import EngineTarget
from compiler.tensorrt import Builder, build_engine, find_builder
from edge_agent.config import Profile
from edge_agent.hardware import find_hardware
from model_registry.compatibility import ArtefactFacts, EngineFacts, resolve, resolve_build, tables
from model_registry.manifest import Graph
from tests.fakes.compiler_models import write_classifier
from wire.errors import ForeshoreError
from wire.messages import Hardware

MICROSOFT = "com.microsoft"
SHAPE = [1, 4]


def _model(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto] | None = None, *, opset: int = 21,
           ir: int = 10, kind: int = TensorProto.FLOAT, domains: dict[str, int] | None = None,
           functions: list[onnx.FunctionProto] | None = None) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, SHAPE)],
        [helper.make_tensor_value_info("y", kind, None)], weights or [],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in (domains or {}).items())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=functions or [])


def _relu(**more: int) -> onnx.ModelProto:
    return _model([helper.make_node("Relu", ["x"], ["y"])], **more)  # type: ignore[arg-type]


def _unary(operator: str, domain: str, **domains: int) -> onnx.ModelProto:
    return _model([helper.make_node(operator, ["x"], ["y"], domain=domain)], domains={domain: 1, **domains})


def _dequantised(kind: int, opset: int, ir: int = 11) -> onnx.ModelProto:
    weights = [helper.make_tensor("w", kind, [4], np.ones(4)), helper.make_tensor("s", 1, [], [1.0])]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="dq"),
        helper.make_node("Add", ["x", "d"], ["y"], name="add"),
    ]
    return _model(nodes, weights, opset=opset, ir=ir)


def _nbits() -> onnx.ModelProto:
    weights = [
        numpy_helper.from_array(np.zeros((8, 1, 8), np.uint8), "w"),
        numpy_helper.from_array(np.ones(8, np.float32), "s"),
    ]
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, K=4, N=8, bits=4, block_size=16)
    return _model([node], weights, domains={MICROSOFT: 1})


def _attention(*, qk_norm: bool) -> onnx.ModelProto:
    """Grouped-query attention over one step, with or without the normalisation that only GPUs have."""
    norm = ["qn", "kn"] if qk_norm else []
    padding = [""] * 7 if qk_norm else []
    inputs = ["q", "k", "v", "pk", "pv", "len", "total", *padding, *norm]
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["y", "nk", "nv"], domain=MICROSOFT, num_heads=2, kv_num_heads=1
    )
    values = {"q": [1, 1, 32], "k": [1, 1, 16], "v": [1, 1, 16], "pk": [1, 1, 0, 16], "pv": [1, 1, 0, 16]}
    weights = [
        numpy_helper.from_array(np.array([0], np.int32), "len"),
        numpy_helper.from_array(np.array(1, np.int32), "total"),
        *(numpy_helper.from_array(np.ones(16, np.float32), name) for name in norm),
    ]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(n, 1, s) for n, s in values.items()],
        [helper.make_tensor_value_info(n, 1, None) for n in ("y", "nk", "nv")], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
                             ir_version=10)  # fmt: skip


def _own_function() -> onnx.ModelProto:
    body = helper.make_function(
        "com.acme", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    node = helper.make_node("Twice", ["x"], ["y"], domain="com.acme")
    return _model([node], domains={"com.acme": 1}, functions=[body])


def _inside_a_branch() -> onnx.ModelProto:
    """The operator that no runtime has hides in one branch of a condition."""
    outputs = [helper.make_tensor_value_info("z", 1, None)]
    then = helper.make_graph([helper.make_node("Fancy", ["x"], ["z"], domain="com.acme")], "then", [], outputs)
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "other", [], outputs)
    weights = [numpy_helper.from_array(np.array(False), "c")]
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    return _model([node], weights, domains={"com.acme": 1})


# name -> graph, and the rule that must decide on this machine's ONNX Runtime (1.32, CPU)
CASES: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    **{f"opset-{n}": (lambda n=n: _relu(opset=n, ir=8), "every_rule") for n in (9, 11, 13, 15, 17, 19, 20, 21, 22, 23)},
    **{f"opset-{n}": (lambda n=n: _relu(opset=n, ir=13), "operator_set") for n in (29, 40)},
    **{f"ir-{n}": (lambda n=n: _relu(opset=17, ir=n), "every_rule") for n in (4, 7, 9, 10, 11, 12, 13)},
    **{f"ir-{n}": (lambda n=n: _relu(opset=17, ir=n), "operator_set") for n in (15, 20)},
    "ml-5": (lambda: _model([helper.make_node("Relu", ["x"], ["y"])], domains={"ai.onnx.ml": 5}), "every_rule"),
    "ml-6": (lambda: _model([helper.make_node("Relu", ["x"], ["y"])], domains={"ai.onnx.ml": 6}), "operator_set"),
    "microsoft-2": (lambda: _model([helper.make_node("Relu", ["x"], ["y"])], domains={MICROSOFT: 2}), "operator_set"),
    **{name: (lambda name=name: _unary(name, MICROSOFT), "every_rule") for name in ("Gelu", "QuickGelu", "FastGelu")},
    "BiasSplitGelu": (lambda: _unary("BiasSplitGelu", MICROSOFT), "contrib_operator"),
    "no-such-microsoft": (lambda: _unary("NoSuchOperator", MICROSOFT), "contrib_operator"),
    "acme": (lambda: _unary("Fancy", "com.acme"), "contrib_operator"),
    "acme-in-a-branch": (_inside_a_branch, "contrib_operator"),
    "acme-as-a-function": (_own_function, "every_rule"),
    "int4-matmul": (_nbits, "every_rule"),
    "attention": (lambda: _attention(qk_norm=False), "every_rule"),
    "attention-qk-norm": (lambda: _attention(qk_norm=True), "contrib_operator"),
    "int8": (lambda: _dequantised(TensorProto.INT8, 13), "every_rule"),
    "int4": (lambda: _dequantised(TensorProto.INT4, 21), "every_rule"),
    "fp8": (lambda: _dequantised(TensorProto.FLOAT8E4M3FN, 19), "every_rule"),
    "fp4": (lambda: _dequantised(TensorProto.FLOAT4E2M1, 23), "number_format"),
    "fp16": (lambda: _relu(kind=TensorProto.FLOAT16), "every_rule"),
    "bf16": (lambda: _relu(kind=TensorProto.BFLOAT16), "number_format"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Hardware:
    profile = Profile(name="here", targets=["cpu"], memory_budget_bytes=1 << 30)
    return find_hardware(profile, tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_what_onnxruntime_does(name: str, here: Hardware) -> None:
    make, rule = CASES[name]
    model = make()
    verdict = resolve(_facts(graph_facts(model)), here)
    assert verdict.rule == rule, verdict
    assert _runs(model) == verdict.will_run


def _facts(graph: Graph, runtime: str = "onnxruntime") -> ArtefactFacts:
    return ArtefactFacts(runtime, ir_version=graph.ir_version, opsets=graph.opsets, operators=tuple(graph.operators),
                         formats=frozenset(graph.formats))  # fmt: skip


def _runs(model: onnx.ModelProto) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[tables.CPU])
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        feeds = {one.name: np.ones(one.shape, kinds[one.type]) for one in session.get_inputs()}
        session.run(None, feeds)
    except Exception:  # noqa: BLE001 - whatever keeps it from running is the answer
        return False
    return True


def test_every_contrib_operator_said_to_run_on_the_cpu_has_a_kernel_there() -> None:
    kernels = {f"{one.domain}.{one.op_name}" for one in native.get_all_opkernel_def() if one.provider == tables.CPU}
    said = {name.split("[")[0] for name, places in tables.CONTRIB_OPERATORS.items() if tables.CPU in places}
    assert said - kernels == set()


# TensorRT-RTX: it builds here without a GPU, and says itself what it does not do


@pytest.fixture(scope="module")
def builder() -> Builder:
    found = find_builder("tensorrt-rtx")
    assert isinstance(found, Builder), found
    return found


def _rtx(capability: str, builder: Builder) -> Hardware:
    return Hardware(profile="rtx", architecture="x86_64", runtimes={"tensorrt-rtx": builder.version},
                    compute_capability=capability, driver="580.65")  # fmt: skip


RTX_CASES: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    **{f"relu-{c}": (lambda: _relu(opset=17, ir=8), c, "every_rule") for c in ("8.0", "8.6", "8.9", "12.0")},
    **{f"relu-{c}": (lambda: _relu(opset=17, ir=8), c, "builder_capability") for c in ("8.7", "9.0", "10.0", "11.0")},
    "gelu-of-onnxruntime": (lambda: _unary("QuickGelu", MICROSOFT), "8.9", "parser_operators"),
    "int4-of-onnxruntime": (_nbits, "8.9", "parser_operators"),
    "acme": (lambda: _unary("Fancy", "com.acme"), "8.9", "parser_operators"),
    "quantised-bias": (lambda: _dequantised(TensorProto.INT32, 13), "8.9", "parser_operators"),
    "fp8-8.6": (lambda: _fp8(), "8.6", "builder_capability"),
    "fp8-8.9": (lambda: _fp8(), "8.9", "every_rule"),
}


def _fp8() -> onnx.ModelProto:
    """A product of two matrices that are quantised to fp8, as ModelOpt writes it."""
    size = 32
    weights = [
        numpy_helper.from_array(np.ones((size, size), np.float32), "w"),
        numpy_helper.from_array(np.array(0.1, np.float32), "s"),
        helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]),
    ]
    nodes = [
        node
        for name in ("x", "w")
        for node in (
            helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}q"], name=f"q{name}"),
            helper.make_node("DequantizeLinear", [f"{name}q", "s", "z"], [f"{name}d"], name=f"dq{name}"),
        )
    ]
    nodes.append(helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"))
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, [4, size])],
                              [helper.make_tensor_value_info("y", 1, [4, size])], weights)  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize("name", RTX_CASES)
def test_the_verdict_is_what_the_rtx_builder_does(name: str, builder: Builder, tmp_path: Path) -> None:
    make, capability, rule = RTX_CASES[name]
    model = make()
    verdict = resolve_build(_facts(graph_facts(model)), _rtx(capability, builder))
    assert verdict.rule == rule, verdict
    onnx.save(model, str(tmp_path / "model.onnx"))
    target = EngineTarget(builder="tensorrt-rtx", compute_capabilities=[capability])
    try:
        build_engine(builder, target, tmp_path / "model.onnx", tmp_path / "engine")
    except ForeshoreError:
        assert not verdict.will_run
    else:
        assert verdict.will_run


def test_an_rtx_engine_loads_nowhere_but_where_it_is_said_to(builder: Builder, tmp_path: Path, here: Hardware) -> None:
    graph = write_classifier(tmp_path / "small.onnx")
    target = EngineTarget(builder="tensorrt-rtx", compute_capabilities=["8.9"])
    build_engine(builder, target, graph, tmp_path / "engine")
    engine = EngineFacts("tensorrt-rtx", builder.version, ("8.9",))
    verdict = resolve(ArtefactFacts("tensorrt-rtx", engine=engine), here)
    assert verdict.rule == "engine_capability", "this machine has no GPU"
    assert resolve(ArtefactFacts("tensorrt-rtx", engine=engine), _rtx("8.9", builder)).will_run
    trt = builder.load()
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    assert runtime.deserialize_cuda_engine((tmp_path / "engine").read_bytes()) is None
