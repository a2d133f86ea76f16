"""Every option of a recipe changes the artefact or is said to have done nothing; unknown ones are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from compiler.block_size import fit_blocks
from compiler.cache import BuildCache
from compiler.cli import app
from compiler.gguf_import import import_gguf
from compiler.language_stages import build_genai
from compiler.many import compile_targets
from compiler.options import builder_options, language_notes
from compiler.pipeline import compile_model
from compiler.progress import Progress, StageTimes
from compiler.recipe import Recipe, TensorRecipe, parse_recipe
from compiler.targets import load_target
from compiler.workshop import Workshop
from tests.fakes.compiler_models import write_classifier, write_llama_gguf
from tests.unit.test_compiler_pipeline import LENIENT, _job, shared_cache
from wire.errors import InvalidInputError, UnsupportedModelError

OPTIONS_THAT_SHAPE: dict[str, tuple[str, Any]] = {
    "precision": ("cpu-x86", "fp16"),
    "calibration_crops": ("cpu-x86", 8),
    "float_rungs": ("cpu-x86", [1]),
}
EVERYTHING = os.environ.get("FORESHORE_FAULTS") == "all"
LIMITS = {
    "gate_crops",
    "golden_min_cosine",
    "golden_min_top1_agreement",
    "max_relative_error",
    "max_top1_drop",
    "min_cosine",
    "min_integer_layer_share",
    "min_top1_agreement",
    "min_worst_slice_agreement",
}
TOLD = {"quantiser", "runtime", "search"}


@pytest.fixture
def cache(tmp_path: Path) -> BuildCache:
    return shared_cache(tmp_path)


def _compile(folder: Path, target: str, tensor: dict[str, Any], cache: BuildCache) -> tuple[str, tuple[str, ...]]:
    """(digest of the model file, notes)."""
    job = _job(folder, target, {"tensor": {**LENIENT["tensor"], "min_integer_layer_share": 0.0, **tensor}})
    built = compile_model(job, folder / f"out{len(list(folder.iterdir()))}", cache, lambda *event: None, {})
    return next(file.digest for file in built.manifest.files if file.path == "model.onnx"), built.notes


def test_the_lists_of_this_file_name_every_option_of_tensor_models() -> None:
    assert set(TensorRecipe.model_fields) == set(OPTIONS_THAT_SHAPE) | LIMITS | TOLD


@pytest.mark.parametrize("name", OPTIONS_THAT_SHAPE)
def test_an_option_that_shapes_the_artefact_changes_its_bytes(name: str, tmp_path: Path, cache: BuildCache) -> None:
    target, value = OPTIONS_THAT_SHAPE[name]
    before, _ = _compile(tmp_path, target, {}, cache)
    after, notes = _compile(tmp_path, target, {name: value}, cache)
    assert after != before
    assert not any(name in note for note in notes)


@pytest.mark.parametrize(
    ("name", "value"), [("calibration_crops", 32), ("float_rungs", [3]), ("quantiser", "modelopt")]
)
def test_an_option_of_8_bits_is_a_no_op_on_floats_and_said_to_be(
    name: str, value: Any, tmp_path: Path, cache: BuildCache
) -> None:
    before, _ = _compile(tmp_path, "cuda", {}, cache)
    after, notes = _compile(tmp_path, "cuda", {name: value}, cache)
    assert after == before
    assert f"tensor.{name}: no effect on fp16" in notes


def test_a_quantiser_that_is_not_installed_is_replaced_and_that_is_said(tmp_path: Path, cache: BuildCache) -> None:
    before, _ = _compile(tmp_path, "jetson-orin", {}, cache)
    after, notes = _compile(tmp_path, "jetson-orin", {"quantiser": "modelopt"}, cache)
    assert after == before
    assert any("not ModelOpt" in note for note in notes)


def test_options_of_the_other_kind_of_model_are_said_to_do_nothing(tmp_path: Path, cache: BuildCache) -> None:
    recipe = {**LENIENT, "language": {"max_kl": 0.1}}
    built = compile_model(_job(tmp_path, recipe=recipe), tmp_path / "out", cache, lambda *event: None)
    assert "language.max_kl: no effect, this is a tensor model" in built.notes


@pytest.mark.parametrize("name", ["hf_remote", "int4_algo_config", "made_up", "exclude_lm_head"])
def test_words_that_the_model_builder_would_swallow_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="builder_options"):
        parse_recipe({"language": {"builder_options": {name: True}}})


def test_builder_options_are_proven_by_building_without_them(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "small.gguf")
    source = import_gguf(tmp_path / "small.gguf", tmp_path / "small")
    cache = BuildCache(tmp_path / "cache")
    shop = Workshop(cache, Progress([], StageTimes(tmp_path / "times.json"), 1, lambda *event: None))
    options = {"accuracy_level": 4} | ({"block_size": 16} if EVERYTHING else {})
    algorithm = "default" if EVERYTHING else "k_quant"  # which cannot take the 96 / 32 blocks of this model
    recipe = parse_recipe({"language": {"builder_options": options, "algorithm": algorithm}})
    language = recipe.filled(load_target("cpu-x86")).language
    built = build_genai(shop, source, "f", "int4", "cpu", fit_blocks(builder_options(language), source))
    notes = language_notes(recipe, shop, source, "f", "int4", "cpu", built)
    assert not any("block_size" in note for note in notes)
    assert any("accuracy_level: no effect" in note for note in notes), notes  # 4 is what it takes for CPUs anyway
    if not EVERYTHING:
        assert _block_sizes(built.path("model/model.onnx")) == {16}


def _block_sizes(path: Path) -> set[int]:
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    found = [node.attribute for node in nodes if node.op_type == "MatMulNBits"]
    return {one.i for attributes in found for one in attributes if one.name == "block_size"}


@pytest.mark.parametrize(
    ("hidden", "inner", "options", "expected"),
    [
        (64, 128, {"algo_config": "k_quant"}, None),
        (64, 96, {"algo_config": "k_quant"}, 16),
        (96, 128, {"algo_config": "k_quant_mixed"}, 16),
        (192, 144, {"algo_config": "k_quant"}, 128),  # blocks of 32: the fifth is half full, of 16: nine, of 64: three
        (64, 96, {"algo_config": "rtn"}, None),
        (64, 96, {"algo_config": "rtn", "is_symmetric": False}, 16),
        (64, 96, {}, None),
        (64, 96, {"algo_config": "k_quant", "block_size": 16}, 16),
    ],
)
def test_rows_have_an_even_number_of_blocks_where_zero_points_are_packed(
    tmp_path: Path, hidden: int, inner: int, options: dict[str, Any], expected: int | None
) -> None:
    _write_config(tmp_path, hidden, inner)
    assert fit_blocks(options, tmp_path).get("block_size") == expected


def test_blocks_that_cannot_be_packed_are_refused_with_a_size_that_can(tmp_path: Path) -> None:
    _write_config(tmp_path, 64, 96)
    with pytest.raises(InvalidInputError, match=r"intermediate_size = 96.*odd.*32") as refused:
        fit_blocks({"algo_config": "k_quant", "block_size": 32}, tmp_path)
    assert "block_size: 16" in refused.value.remedy
    _write_config(tmp_path, 16, 100)
    with pytest.raises(UnsupportedModelError, match="hidden_size = 16"):
        fit_blocks({"algo_config": "k_quant"}, tmp_path)


def _write_config(folder: Path, hidden: int, inner: int) -> None:
    config = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 4, "head_dim": hidden // 4}
    (folder / "config.json").write_text(json.dumps(config))


def test_one_failing_target_does_not_end_the_others(tmp_path: Path, cache: BuildCache) -> None:
    source = write_classifier(tmp_path / "classifier.onnx")
    recipe = Recipe.model_validate({"tensor": {**LENIENT["tensor"], "precision": "fp8"}})
    targets = [load_target("cpu-x86"), load_target("cpu-reference")]
    results = compile_targets(source, targets, recipe, tmp_path / "out", cache, lambda *event: None)
    assert [type(result.error).__name__ for result in results] == ["InvalidInputError"] * 2
    assert "fp8" in str(results[0].to_dict()["error"])


def test_the_command_compiles_for_several_targets_and_writes_the_report(tmp_path: Path) -> None:
    source = write_classifier(tmp_path / "classifier.onnx")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tensor: {min_top1_agreement: 0.5, min_cosine: 0.9, gate_crops: 16, calibration_crops: 16}\n")
    command = ["compile", str(source), "--targets", "cpu-x86,cuda,cpu-x86", "--out", str(tmp_path / "out"), "--json"]
    command += ["--recipe", str(recipe), "--cache", str(tmp_path / "cache"), "--report", str(tmp_path / "r.html")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    targets = json.loads(result.stdout.splitlines()[-1])["targets"]
    assert [target["target"] for target in targets] == ["cpu-x86", "cuda"]
    assert targets[0]["tried"][-1]["label"] == "int8, 0 of 3 layers float"
    page = (tmp_path / "r.html").read_text()
    assert "cpu-x86" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert (tmp_path / "out" / "cuda" / "model.onnx").exists()


def test_the_command_ends_with_5_when_a_gate_does_not_hold(tmp_path: Path) -> None:
    source = write_classifier(tmp_path / "classifier.onnx")
    (tmp_path / "recipe.yaml").write_text("max_size_ratio: 0.01\n")
    command = ["compile", str(source), "--targets", "cpu-reference", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--recipe", str(tmp_path / "recipe.yaml"), "--cache", str(tmp_path)])
    assert result.exit_code == 5
    assert "size_ratio" in result.output


def test_fp8_without_the_model_optimizer_is_refused_with_the_way_to_it(tmp_path: Path, cache: BuildCache) -> None:
    recipe = {"tensor": {**LENIENT["tensor"], "precision": "fp8"}}
    with pytest.raises(InvalidInputError, match="FORESHORE_MODELOPT_PYTHON"):
        compile_model(_job(tmp_path, "rtx-sm89", recipe), tmp_path / "out", cache, lambda *event: None, {})
