"""What runs an artefact: chosen by figures where they mean something, else by a stated rule, or named by the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from compiler.graph_facts import graph_facts
from compiler.pipeline import compile_model
from compiler.recipe import Recipe, parse_recipe
from compiler.runtime_choice import GENAI, LOOP, can_measure, choose_for_language, measure_speeds
from compiler.targets import Target, load_target
from edge_agent.runtimes.base import LanguageLimits
from edge_agent.runtimes.language import load_language
from model_registry.compatibility.facts import ArtefactFacts, facts_of
from model_registry.compatibility.resolver import resolve
from model_registry.manifest import RuntimeChoice, parse_manifest
from tests.fakes.compiler_models import write_classifier
from tests.fakes.decoder_export import build_shared, tiny_source
from tests.unit.test_compiler_pipeline import LENIENT, _job, shared_cache
from wire.errors import InvalidInputError, UnsupportedModelError
from wire.messages import Hardware

CPU, GPU = load_target("cpu-x86"), load_target("cuda")


def _figures(one: float, four: float) -> dict[str, float]:
    return {"decode_1_tokens_per_s": one, "decode_4_tokens_per_s": four}


@pytest.mark.parametrize(
    ("loop", "genai", "chosen"),
    [
        (_figures(100, 200), _figures(100, 100), LOOP),
        (_figures(100, 100), _figures(130, 130), GENAI),
        (_figures(100, 100), _figures(105, 105), LOOP),  # a tie
        (_figures(50, 50), "no plain decoder", LOOP),
        ("no plain decoder", _figures(50, 50), GENAI),
    ],
)
def test_figures_choose_and_both_sides_keep_theirs(loop: Any, genai: Any, chosen: str) -> None:
    choice = choose_for_language(Recipe(), CPU, {LOOP: loop, GENAI: genai})
    assert (choice.basis, choice.chosen.runtime) == ("measured", chosen)
    by_runtime = {option.runtime: option.figures for option in (choice.chosen, *choice.rejected)}
    assert by_runtime == {
        LOOP: loop if isinstance(loop, dict) else {},
        GENAI: genai if isinstance(genai, dict) else {},
    }
    assert RuntimeChoice.model_validate_json(choice.model_dump_json()) == choice


def test_without_the_targets_arithmetic_a_rule_decides_and_says_so() -> None:
    choice = choose_for_language(Recipe(), CPU, None)
    assert (choice.basis, choice.chosen.runtime) == ("rule", LOOP)
    assert "not measured" in choice.chosen.reason
    assert choose_for_language(Recipe(), GPU, None).chosen.runtime == GENAI
    assert not can_measure(Recipe(), GPU)


def test_the_recipe_is_obeyed_and_nothing_is_measured_for_it() -> None:
    recipe = parse_recipe({"language": {"runtime": GENAI}})
    assert not any(can_measure(recipe, load_target(name)) for name in ("cpu-x86", "cpu-x86-vnni", "cpu-arm"))
    choice = choose_for_language(recipe, CPU, None)
    assert (choice.basis, choice.chosen.runtime) == ("recipe", GENAI)


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        ({"language": {"runtime": "llama.cpp"}}, CPU),
        ({"language": {"runtime": "onnxruntime"}}, GPU),
        ({"tensor": {"runtime": "tensorrt-rtx"}}, CPU),
        ({"tensor": {"runtime": "tensorrt"}}, load_target("rtx")),
    ],
)
def test_a_runtime_that_the_target_does_not_have_is_refused(recipe: Mapping[str, Any], target: Target) -> None:
    with pytest.raises(InvalidInputError, match=r"runtime|onnxruntime|engine"):
        parse_recipe(recipe).filled(target)


def test_a_recipe_that_names_onnxruntime_gets_no_engine_and_asks_for_none(tmp_path: Path) -> None:
    def build(runtime: str, name: str) -> Any:
        recipe = {"tensor": {**LENIENT["tensor"], "runtime": runtime}}
        job = _job(tmp_path, "jetson-orin", recipe)
        return compile_model(job, tmp_path / name, shared_cache(tmp_path), lambda *event: None, {}).manifest

    auto, plain = build("auto", "auto"), build("onnxruntime", "plain")
    assert auto.runtime_choice.chosen.runtime == "tensorrt"
    assert "not built here" in auto.runtime_choice.chosen.reason
    assert plain.runtime_choice.basis == "recipe"
    assert parse_manifest(plain.to_bytes()) == plain
    assert not facts_of(auto).declines_engines
    assert facts_of(plain).declines_engines


def test_the_agent_runs_what_was_chosen_and_both_are_really_measured(tmp_path: Path) -> None:
    tiny_source(tmp_path / "source")
    build_shared(tmp_path / "source", tmp_path / "model")
    speeds = measure_speeds(tmp_path / "model")
    for runtime in (LOOP, GENAI):
        figures = speeds[runtime]
        assert not isinstance(figures, str), figures
        assert min(figures.values()) > 0
        model = load_language(tmp_path / "model", LanguageLimits(64, 1, 1), runtime)  # type: ignore[arg-type]
        assert model.name == runtime
        model.close()
    (tmp_path / "model" / "model.onnx").write_bytes(b"no graph")
    assert all(isinstance(figures, str) for figures in measure_speeds(tmp_path / "model").values())
    with pytest.raises(UnsupportedModelError):
        load_language(tmp_path / "model", LanguageLimits(64, 1, 1), "onnxruntime")


@pytest.mark.parametrize("target", ["cpu-reference", "cpu-x86", "cuda", "jetson-orin"])
def test_an_operator_set_that_nothing_uses_keeps_no_older_runtime_out(tmp_path: Path, target: str) -> None:
    older = Hardware(profile="old", runtimes={"onnxruntime": "1.18.1"})
    source = write_classifier(tmp_path / "classifier.onnx")
    model = onnx.load(str(source))
    model.opset_import.extend([helper.make_opsetid("ai.onnx.ml", 5)])
    onnx.save(model, str(source))
    asked = ArtefactFacts("onnxruntime", ir_version=8, opsets=graph_facts(model).opsets)
    assert resolve(asked, older).rule == "operator_set"
    built = compile_model(_job(tmp_path, target), tmp_path / "out", shared_cache(tmp_path), lambda *event: None, {})
    facts = replace(facts_of(built.manifest), architectures=(), cpu_features=(), memory_bytes=0, disk_bytes=0)
    assert resolve(facts, older).rule != "operator_set"
    graph = onnx.load(str(built.folder / "model.onnx"))
    used = {node.domain or "ai.onnx" for node in graph.graph.node} | {"ai.onnx"}
    assert set(graph_facts(graph).opsets) == used
    assert built.manifest.graph is not None
    assert set(built.manifest.graph.opsets) == used
