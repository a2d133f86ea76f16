"""Gates, recipes, targets and the build cache: pure decisions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compiler.cache import BuildCache, Stage
from compiler.gates import gate, require_all
from compiler.metrics import mean_cosine, mean_kl, perplexity, top1_agreement
from compiler.recipe import parse_recipe
from compiler.targets import TARGETS_FOLDER, load_target, load_targets, parse_target
from wire.errors import GateFailedError, InvalidInputError, NotFoundError


def test_equal_logits_agree_in_every_measure() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 5, 7))
    assert top1_agreement(logits, logits) == 1.0
    assert mean_cosine(logits, logits) == pytest.approx(1.0)
    assert mean_kl(logits, logits) == pytest.approx(0.0, abs=1e-12)


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    assert perplexity(np.zeros((1, 4, 50)), np.zeros((1, 4), np.int64)) == pytest.approx(50.0)


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
