"""The resolver against known outcomes: every pair of an artefact and a device in the table, and the rule that decides.

A cell is `+` where the artefact runs, else the letter of the rule that must refuse it. The outcomes are what vendors'
support lists, ONNX Runtime's releases and our own trials say (see `tests/unit/test_compatibility_real.py`).
"""

from __future__ import annotations

import pytest

from model_registry.compatibility import ArtefactFacts, EngineFacts, HardwareKey, choose, key_of, resolve, resolve_build
from model_registry.compatibility.hardware_key import parse_key
from model_registry.compatibility.rules import RULES
from wire.messages import Hardware

MIB = 1 << 20
CUDA = "CUDAExecutionProvider"
AVX = ["sse4_2", "avx"]
AVX2 = [*AVX, "avx2", "fma"]
VNNI = [*AVX2, "avx512f", "avx512_vnni"]
RTX = "tensorrt-rtx"
RTX_NOW = {"onnxruntime": "1.32.0", "onnxruntime-genai": "0.18.0", RTX: "1.7.1.116"}

RULE_BY_LETTER = {
    "a": "architecture", "f": "cpu_features", "r": "runtime", "p": "provider", "o": "operator_set",
    "c": "contrib_operator", "n": "number_format", "d": "driver", "R": "engine_runtime", "C": "engine_capability",
    "J": "engine_jetpack", "A": "engine_architecture", "+": "every_rule",
}  # fmt: skip


def _device(architecture: str, runtimes: dict[str, str], *, features: list[str] | None = None, memory_mib: int = 8192,
            **more: object) -> Hardware:  # fmt: skip
    return Hardware.model_validate({
        "profile": "table", "targets": ["t"], "architecture": architecture, "runtimes": runtimes,
        "cpu_features": features or (["asimd"] if architecture == "aarch64" else AVX2),
        "memory_budget_bytes": memory_mib * MIB, "disk_free_bytes": 64 << 30, **more,
    })  # fmt: skip


def _rtx(capability: str, **more: object) -> Hardware:
    return _device("x86_64", RTX_NOW, compute_capability=capability, **{"driver": "580.65.06", **more})


def _jetson(capability: str, jetpack: str, runtimes: dict[str, str], **more: object) -> Hardware:
    return _device("aarch64", runtimes, compute_capability=capability, jetpack=jetpack, **more)


DEVICES = {
    "x86-vnni": _device("x86_64", {"onnxruntime": "1.32.0", "onnxruntime-genai": "0.18.0"}, features=VNNI),
    "x86-old": _device("x86_64", {"onnxruntime": "1.23.2", "onnxruntime-genai": "0.9.2"}, features=AVX),
    "x86-small": _device("x86_64", {"onnxruntime": "1.32.0"}, features=VNNI, memory_mib=192),
    "arm-board": _device("aarch64", {"onnxruntime": "1.22.1"}, memory_mib=2048),
    "orin-jp62": _jetson("8.7", "6.2", {"onnxruntime-gpu": "1.23.2", "onnxruntime-genai-cuda": "0.9.2",
                         "tensorrt": "10.3.0"}, providers=[CUDA]),
    "orin-jp61": _jetson("8.7", "6.1", {"onnxruntime": "1.20.1", "tensorrt": "10.3.0"}),
    "orin-jp60": _jetson("8.7", "6.0", {"onnxruntime-gpu": "1.18.0", "tensorrt": "8.6.2"}, providers=[CUDA]),
    "thor": _jetson("11.0", "7.0", {"onnxruntime": "1.23.2", "tensorrt": "10.13.3"}),
    "rtx3060": _rtx("8.6"),
    "rtx4090": _rtx("8.9"),
    "rtx5090": _rtx("12.0"),
    "rtx4090-driver550": _rtx("8.9", driver="550.54"),
    "turing": _rtx("7.5"),
    "rtx3060-rtx16": _device("x86_64", {**RTX_NOW, RTX: "1.6.1.40"}, compute_capability="8.6", driver="580.65"),
    "h100": _device("x86_64", {"onnxruntime-gpu": "1.31.1", "onnxruntime-genai-cuda": "0.18.0", RTX: "1.7.1.116"},
                    features=VNNI, compute_capability="9.0", driver="580.65", providers=[CUDA]),
    "h100-tensorrt": _device("x86_64", {"onnxruntime": "1.32.0", "tensorrt": "10.3.0"}, compute_capability="9.0"),
    "grace-hopper": _device("aarch64", {"onnxruntime": "1.32.0", "tensorrt": "10.3.0"}, compute_capability="9.0"),
    "lean-runtime": _device("x86_64", {"onnxruntime": "1.23.2", "tensorrt-lean": "10.3.0"}, compute_capability="8.6"),
}  # fmt: skip


def _onnx(**more: object) -> ArtefactFacts:
    facts = {"runtime": "onnxruntime", "ir_version": 9, "opsets": {"ai.onnx": 20}, "memory_bytes": 150 * MIB,
             "disk_bytes": 50 * MIB, **more}  # fmt: skip
    return ArtefactFacts(**facts)  # type: ignore[arg-type]


def _genai(*operators: str, **more: object) -> ArtefactFacts:
    names = tuple(f"com.microsoft.{one}" for one in operators)
    opsets = {"ai.onnx": 20, "com.microsoft": 1}
    return _onnx(runtime="onnxruntime-genai", operators=names, opsets=opsets, memory_bytes=700 * MIB, **more)


def _engine(builder: str, version: str, *capabilities: str, formats: frozenset[str] = frozenset(), jetpack: str | None
            = None, architecture: str | None = None, compatible: bool = False) -> ArtefactFacts:  # fmt: skip
    engine = EngineFacts(builder, version, capabilities, jetpack, architecture, compatible)
    return ArtefactFacts(runtime=builder, memory_bytes=100 * MIB, formats=formats, engine=engine)


ARTEFACTS = {
    "fp32": _onnx(),
    "int8-vnni": _onnx(architectures=("x86_64",), cpu_features=("avx2", "avx512_vnni"), formats=frozenset({"int8"})),
    "int8-arm": _onnx(architectures=("aarch64",), formats=frozenset({"int8"})),
    "opset23": _onnx(opsets={"ai.onnx": 23}, ir_version=11),
    "opset29": _onnx(opsets={"ai.onnx": 29}, ir_version=15),
    "int4-genai": _genai("MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"),
    "qk-norm-cuda": _genai("GroupQueryAttention", "GroupQueryAttention[qk_norm]", providers=(CUDA,)),
    "fp16-cuda": _onnx(providers=(CUDA,), formats=frozenset({"fp16"})),
    "bf16": _onnx(formats=frozenset({"bf16"})),
    "custom-operator": _onnx(operators=("com.acme.Fancy",)),
    "rtx-engine": _engine(RTX, "1.7.1.116", "8.6", "8.9", "12.0"),
    "rtx-fp8": _engine(RTX, "1.7.1.116", "8.9", "12.0", formats=frozenset({"fp8"})),
    "rtx-fp4": _engine(RTX, "1.7.1.116", "12.0", formats=frozenset({"fp4"})),
    "orin-engine-jp62": _engine("tensorrt", "10.3.0", "8.7", jetpack="6.2", architecture="aarch64"),
    "orin-engine-jp60": _engine("tensorrt", "8.6.2", "8.7", jetpack="6.0", architecture="aarch64"),
    "sm90-engine": _engine("tensorrt", "10.3.0", "9.0", architecture="x86_64"),
    "sm86-compatible": _engine("tensorrt", "10.3.0", "8.6", architecture="x86_64", compatible=True),
}

#                     fp32 vnni arm o23 o29 int4 qkn fp16 bf16 acme rtx fp8 fp4 jp62 jp60 sm90 sm86
TABLE = """
x86-vnni              +    +    a   +   o   +    p   p    n    c    r   r   r   r    r    r    r
x86-old               +    f    a   +   o   +    p   p    n    c    r   r   r   r    r    r    r
x86-small             +    +    a   +   o   r    r   p    n    c    r   r   r   r    r    r    r
arm-board             +    a    +   o   o   r    r   p    n    c    r   r   r   r    r    r    r
orin-jp62             +    a    +   +   o   +    c   +    n    c    r   r   r   +    R    C    C
orin-jp61             +    a    +   o   o   r    r   p    n    c    r   r   r   J    R    C    C
orin-jp60             +    a    +   o   o   r    r   +    n    c    r   r   r   R    +    R    R
thor                  +    a    +   +   o   r    r   p    n    c    r   r   r   R    R    R    C
rtx3060               +    f    a   +   o   +    p   p    n    c    +   n   n   r    r    r    r
rtx4090               +    f    a   +   o   +    p   p    n    c    +   +   n   r    r    r    r
rtx5090               +    f    a   +   o   +    p   p    n    c    +   +   +   r    r    r    r
rtx4090-driver550     +    f    a   +   o   +    p   p    n    c    d   d   n   r    r    r    r
turing                +    f    a   +   o   +    p   p    n    c    C   n   n   r    r    r    r
rtx3060-rtx16         +    f    a   +   o   +    p   p    n    c    R   n   n   r    r    r    r
h100                  +    +    a   +   o   +    c   +    n    c    C   C   n   r    r    r    r
h100-tensorrt         +    f    a   +   o   r    r   p    n    c    r   r   r   C    R    +    C
grace-hopper          +    a    +   +   o   r    r   p    n    c    r   r   r   C    R    A    C
lean-runtime          +    f    a   +   o   r    r   p    n    c    r   r   r   R    R    R    +
"""
PAIRS = [
    (device, artefact, letter)
    for device, *letters in (line.split() for line in TABLE.strip().splitlines())
    for artefact, letter in zip(ARTEFACTS, letters, strict=True)
]


@pytest.mark.parametrize("device", DEVICES)
def test_each_artefact_is_judged_as_it_is_known_to_end(device: str) -> None:
    row = [(artefact, letter) for name, artefact, letter in PAIRS if name == device]
    assert len(row) == len(ARTEFACTS)
    found = {artefact: resolve(ARTEFACTS[artefact], DEVICES[device]) for artefact, _ in row}
    assert {artefact: one.rule for artefact, one in found.items()} == {a: RULE_BY_LETTER[x] for a, x in row}
    assert all(one.will_run == (one.rule == "every_rule") for one in found.values())


def test_the_table_is_large_and_nothing_is_wrongly_said_to_run() -> None:
    wrong = [pair for pair in PAIRS if resolve(ARTEFACTS[pair[1]], DEVICES[pair[0]]).will_run and pair[2] != "+"]
    assert len(PAIRS) >= 200
    assert wrong == []


def test_an_h100_is_told_that_the_rtx_runtime_refuses_it() -> None:
    verdict = resolve(ARTEFACTS["rtx-engine"], DEVICES["h100"])
    assert verdict.sentence == (
        "is for TensorRT-RTX, which refuses compute capability 9.0: it serves 8.0, 8.6, 8.9, 12.0, 12.1"
    )


@pytest.mark.parametrize(
    ("artefact", "changes", "rule"),
    [
        ({"memory_bytes": 300 * MIB}, {"memory_budget_bytes": 299 * MIB}, "memory_budget"),
        ({"memory_bytes": 300 * MIB}, {"memory_budget_bytes": 300 * MIB}, "every_rule"),
        ({"disk_bytes": 300 * MIB}, {"disk_free_bytes": 299 * MIB}, "disk_space"),
        ({"runtime_version": "1.32.1"}, {}, "runtime_version"),
        ({"runtime_version": "1.9"}, {}, "every_rule"),
        ({"hardware_key": "tensorrt-10.3.0.sm87.aarch64.jetpack-6.2"}, {}, "hardware_key"),
        ({"hardware_key": "of-the-profile"}, {"hardware_key": "of-the-profile"}, "every_rule"),
        ({"runtime": "safetensors"}, {}, "runtime"),
        ({"opsets": {"ai.onnx": 20, "ai.onnx.ml": 6}}, {}, "operator_set"),
        ({"opsets": {"ai.onnx": 20, "com.acme": 7}}, {}, "every_rule"),
        ({"operators": ("com.microsoft.QMoE",)}, {"runtimes": {"onnxruntime": "1.22.1"}}, "contrib_operator"),
        ({"formats": frozenset({"fp4"})}, {}, "number_format"),
    ],
)
def test_one_fact_decides(artefact: dict[str, object], changes: dict[str, object], rule: str) -> None:
    device = DEVICES["x86-vnni"].model_copy(update=changes)
    assert resolve(_onnx(**artefact), device).rule == rule


def test_what_a_device_does_not_tell_is_named_and_not_held_against_it() -> None:
    silent = Hardware(profile="silent", targets=["cpu-x86"])
    verdict = resolve(ARTEFACTS["int8-vnni"], silent)
    assert verdict.will_run
    assert set(verdict.assumed) >= {"architecture", "processor features", "runtimes", "memory budget"}
    assert "if its architecture" in verdict.sentence


@pytest.mark.parametrize("artefact", [name for name in ARTEFACTS if "engine" in name or "cuda" in name])
def test_engines_and_providers_are_not_presumed(artefact: str) -> None:
    assert not resolve(ARTEFACTS[artefact], Hardware(profile="silent", targets=["t"])).will_run


def test_every_rule_has_a_name_of_its_own_and_decides_somewhere() -> None:
    names = [rule.__name__ for rule in RULES]
    deciding = {RULE_BY_LETTER[letter] for _, _, letter in PAIRS}
    by_one_fact = {"memory_budget", "disk_space", "runtime_version", "hardware_key"}
    assert len(set(names)) == len(names)
    assert set(names) == (deciding - {"every_rule"}) | by_one_fact


def test_the_first_target_that_runs_is_chosen_and_the_reason_names_those_before_it() -> None:
    device = DEVICES["x86-old"].model_copy(update={"targets": ["rtx", "vnni", "plain"]})
    facts = {"plain": ARTEFACTS["fp32"], "vnni": ARTEFACTS["int8-vnni"], "rtx": ARTEFACTS["rtx-engine"]}
    choice = choose(list(facts), facts.__getitem__, device)
    assert choice.target == "plain"
    assert choice.reason.startswith("plain runs: none of")
    assert "wanted more: rtx needs tensorrt-rtx, here are onnxruntime, onnxruntime-genai; vnni needs" in choice.reason
    none = choose(["vnni"], facts.__getitem__, device)
    assert (none.target, none.rule) == (None, "cpu_features")
    other = choose(["jetson"], facts.__getitem__, device)
    assert (other.target, other.rule) == (None, "target")


def test_a_hardware_key_holds_what_an_engine_is_bound_to() -> None:
    key = key_of(DEVICES["orin-jp62"])
    assert key == HardwareKey("tensorrt", "10.3.0", "8.7", "aarch64", "6.2")
    assert str(key) == "tensorrt-10.3.0.sm87.aarch64.jetpack-6.2"
    for device in DEVICES.values():
        found = key_of(device)
        assert found is None or parse_key(str(found)) == found
    assert key_of(DEVICES["x86-vnni"]) is None
    assert parse_key("sm87-trt10") is None


@pytest.mark.parametrize(
    ("artefact", "device", "rule"),
    [
        (_onnx(opsets={"ai.onnx": 17}), "orin-jp60", "every_rule"),
        (_onnx(opsets={"ai.onnx": 18}), "orin-jp60", "parser_operators"),  # TensorRT 8.6 reads up to 17
        (_onnx(), "orin-jp62", "every_rule"),
        (_onnx(formats=frozenset({"int32_bias"})), "orin-jp62", "parser_operators"),
        (_onnx(formats=frozenset({"fp8"})), "orin-jp62", "builder_capability"),
        (_onnx(formats=frozenset({"bf16"})), "orin-jp62", "builder_capability"),
        (_onnx(operators=("com.microsoft.MatMulNBits",)), "rtx4090", "parser_operators"),
        (_genai("MatMulNBits"), "rtx4090", "parser_operators"),
        (_onnx(formats=frozenset({"fp8"})), "rtx3060", "builder_capability"),
        (_onnx(formats=frozenset({"fp8"})), "rtx4090", "every_rule"),
        (_onnx(), "h100", "builder_capability"),
        (_onnx(), "h100-tensorrt", "every_rule"),
        (_onnx(), "x86-vnni", "parser_operators"),
        (_onnx(), "thor", "every_rule"),
    ],
)
def test_a_build_is_asked_for_only_where_it_can_succeed(artefact: ArtefactFacts, device: str, rule: str) -> None:
    assert resolve_build(artefact, DEVICES[device]).rule == rule
