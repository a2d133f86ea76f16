"""Gates, recipes, targets and the build cache: pure decisions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compiler.cache import BuildCache, Stage
from compiler.gates import budget_gates, gate, language_gates, require_all, tensor_gates
from compiler.metrics import (
    language_figures,
    mean_cosine,
    mean_kl,
    perplexity,
    tensor_figures,
    top1_accuracy,
    top1_agreement,
    worst_slice,
)
from compiler.prompt_set import Answers, prompt_figures
from compiler.recipe import LanguageRecipe, TensorRecipe, parse_recipe
from compiler.soundness import count_broken_numbers
from compiler.targets import TARGETS_FOLDER, Budget, load_target, load_targets, parse_target
from tests.fakes.compiler_models import write_classifier
from wire.errors import GateFailedError, InvalidInputError, NotFoundError


def test_equal_logits_agree_in_every_measure() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 5, 7))
    assert top1_agreement(logits, logits) == 1.0
    assert mean_cosine(logits, logits) == pytest.approx(1.0)
    assert mean_kl(logits, logits) == pytest.approx(0.0, abs=1e-12)


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    assert perplexity(np.zeros((1, 4, 50)), np.zeros((1, 4), np.int64)) == pytest.approx(50.0)


def _logits(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.random.default_rng(3).standard_normal(shape)


def test_a_wrong_scale_passes_cosine_and_agreement_but_not_the_relative_error() -> None:
    source = _logits(40, 10)
    results = {one.name: one for one in tensor_gates(tensor_figures(source, 2 * source), TensorRecipe())}
    assert results["cosine"].passed
    assert results["top1_agreement"].passed
    assert results["relative_error"].value == pytest.approx(1.0)
    assert not results["relative_error"].passed


def test_the_class_that_suffers_alone_is_found_behind_a_good_mean() -> None:
    source = np.eye(10)[np.repeat(np.arange(10), 20)]
    broken = source.copy()
    broken[:20] = source[20:40]  # all of class 0 answered as class 1
    figures = tensor_figures(source, broken)
    assert figures["top1_agreement"] == pytest.approx(0.9)
    assert figures["worst_slice_agreement"] == 0.0
    assert "worst_slice_agreement" in str([one for one in tensor_gates(figures, TensorRecipe()) if not one.passed])


def test_slices_of_a_few_cases_are_no_slices_and_nan_is_the_worst() -> None:
    values = np.array([0.0] * 3 + [0.5] * 8 + [0.9] * 8)
    groups = ["few"] * 3 + ["half"] * 8 + ["most"] * 8
    found = worst_slice(values, groups)
    assert found is not None
    assert (found.group, found.value, found.num_cases) == ("half", 0.5, 8)
    values[-1] = np.nan
    worst = worst_slice(values, groups, smallest_is_worst=False)
    assert worst is not None
    assert worst.group == "most"
    assert worst_slice(values, list(range(len(values)))) is None


def test_one_nan_in_an_output_fails_every_gate_of_its_figures() -> None:
    source = _logits(40, 10)
    broken = source.copy()
    broken[7, 3] = np.nan
    failed = {one.name for one in tensor_gates(tensor_figures(source, broken), TensorRecipe()) if not one.passed}
    assert {"cosine", "relative_error", "top1_agreement"} <= failed


def test_outputs_of_another_shape_fail() -> None:
    assert not all(one.passed for one in tensor_gates(tensor_figures(_logits(4, 10), _logits(4, 9)), TensorRecipe()))


def test_labels_tell_the_accuracy_that_was_lost() -> None:
    source = np.eye(4)[np.array([0, 1, 2, 3])]
    labels = np.array([0, 1, 2, 0])
    assert top1_accuracy(source, labels) == 0.75
    assert tensor_figures(source, np.roll(source, 1, axis=1), labels=labels)["top1_drop"] == pytest.approx(0.5)


def test_every_figure_of_a_language_model_is_required() -> None:
    source = _logits(2, 8, 12)
    figures = language_figures(source, source, np.zeros((2, 8), np.int64))
    answers = Answers([[1]], "v", [[1]], [[2, 3]])
    figures |= prompt_figures(answers, answers)
    assert all(one.passed for one in language_gates(figures, LanguageRecipe()))
    for name in figures:
        without = {key: value for key, value in figures.items() if key != name}
        assert [one.name for one in language_gates(without, LanguageRecipe()) if not one.passed] == [name]


def test_answers_match_from_the_first_to_the_last_token_and_other_words_are_no_match() -> None:
    source = Answers([[1], [2]], "v", [[1], [1], [1]], [[5, 6], [7, 8], [9, 9]])
    artefact = Answers([[1], [3]], "v", [[1], [1], [1]], [[5, 6], [7, 1], [9]])
    assert prompt_figures(source, artefact) == {"exact_match": pytest.approx(2 / 3), "tokenizer_match": 0.5}
    assert prompt_figures(source, Answers([[1], [2]], "w", [], source.answers))["tokenizer_match"] == 0.0


def test_a_budget_is_judged_where_there_is_one_and_a_figure_nobody_measured_fails() -> None:
    assert budget_gates({}, Budget()) == []
    results = budget_gates({"memory_bytes": 5e6}, Budget(latency_ms=10, memory_bytes=4_000_000))
    assert [(one.name, one.passed) for one in results] == [("latency_ms", False), ("memory_bytes", False)]
    assert all(one.passed for one in budget_gates({"latency_ms": 9.0}, Budget(latency_ms=10)))


def test_an_infinite_weight_is_counted_and_an_infinite_mask_is_not(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "m.onnx")
    assert count_broken_numbers(path) == 0
    model = onnx.load(str(path))
    bias = next(one for one in model.graph.initializer if one.name == "bh")
    bias.CopyFrom(numpy_helper.from_array(np.array([np.inf, np.nan] + [0.0] * 8, np.float32), "bh"))
    model.graph.initializer.append(numpy_helper.from_array(np.full(3, -np.inf, np.float32), "mask"))
    onnx.save(model, str(path))
    assert count_broken_numbers(path) == 2
    assert not gate("broken_numbers", 2, "<=", 0).passed


@pytest.mark.parametrize("sense", ["<=", ">="])
def test_a_value_that_is_not_a_number_fails_whatever_the_limit(sense: str) -> None:
    assert not gate("x", float("nan"), sense, 0.0).passed  # type: ignore[arg-type]


def test_a_failed_gate_names_value_and_limit() -> None:
    with pytest.raises(GateFailedError, match=r"top1 is 0\.5, limit >= 0\.9"):
        require_all([gate("top1", 0.5, ">=", 0.9), gate("size", 1, "<=", 2)])


@pytest.mark.parametrize("name", sorted(path.stem for path in TARGETS_FOLDER.glob("*.yaml")))
def test_every_target_file_is_read_by_the_schema_that_jobs_use(name: str) -> None:
    target = load_target(name)
    assert parse_target(target.model_dump(mode="json")) == target


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match="cpu-x86"):
        load_target("toaster")


@pytest.mark.parametrize(
    "document", [{"tensr": {}}, {"tensor": {"precison": "int8"}}, {"tensor": {"precision": "int3"}}]
)
def test_a_recipe_with_an_unknown_key_or_value_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match="recipe"):
        parse_recipe(document)


def test_a_recipe_is_filled_from_the_target_and_keeps_its_own_choice() -> None:
    target = load_target("cpu-x86")
    assert parse_recipe({}).filled(target).language.precision == "int4"
    assert parse_recipe({"language": {"precision": "int8"}}).filled(target).language.precision == "int8"


def _stage(inputs: dict[str, object], build: Callable[[Path], object], name: str = "s") -> Stage:
    return Stage(name, inputs, (), lambda folder: build(folder) and None)


def _fail(folder: Path) -> None:
    (folder / "half").write_text("done")
    raise RuntimeError("no")


def test_every_input_changes_the_key_of_a_stage() -> None:
    stages = [_stage({"x": 1}, bool), _stage({"x": 1}, bool, "b"), _stage({"x": 2}, bool), _stage({"y": 1}, bool)]
    assert len({stage.key() for stage in stages}) == 4


def test_a_stage_is_built_once_and_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    cache = BuildCache(tmp_path)
    with pytest.raises(RuntimeError):
        cache.get_or_build(_stage({}, _fail))
    assert list(tmp_path.iterdir()) == []
    first = cache.get_or_build(_stage({}, lambda folder: (folder / "f").write_text("once")))
    second = cache.get_or_build(_stage({}, lambda folder: pytest.fail("built twice")))
    assert not first.was_cached
    assert second.was_cached
    assert second.path("f").read_text() == "once"
    assert first.digest == second.digest


def test_a_full_cache_drops_the_other_entries_and_keeps_the_new_one(tmp_path: Path) -> None:
    cache = BuildCache(tmp_path, max_bytes=10)
    cache.get_or_build(_stage({"n": 1}, lambda folder: (folder / "f").write_bytes(b"x" * 8)))
    kept = cache.get_or_build(_stage({"n": 2}, lambda folder: (folder / "f").write_bytes(b"x" * 8)))
    assert list(tmp_path.iterdir()) == [kept.folder]


def test_what_a_dead_builder_left_goes_with_the_next_build(tmp_path: Path) -> None:
    (tmp_path / ".building-4194399-x" / "result").mkdir(parents=True)
    BuildCache(tmp_path).get_or_build(_stage({}, lambda folder: (folder / "f").write_text("new")))
    assert not list(tmp_path.glob(".building-*"))


@pytest.mark.parametrize("target", ["cpu-x86", "cuda", "rtx", "rtx-sm86"])
def test_fp8_is_refused_where_a_device_of_the_target_has_none(target: str) -> None:
    with pytest.raises(InvalidInputError, match="fp8 needs compute capability"):
        parse_recipe({"tensor": {"precision": "fp8"}}).filled(load_target(target))
    parse_recipe({"tensor": {"precision": "fp8"}}).filled(load_target("rtx-sm89"))


def test_all_targets_are_at_least_six_and_named_once() -> None:
    everything = load_targets("all")
    assert len(everything) == len({target.name for target in everything}) >= 6
    assert [target.name for target in load_targets("cuda, cpu-x86, cuda")] == ["cuda", "cpu-x86"]
