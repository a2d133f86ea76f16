"""Gates, recipes, targets and the build cache: pure decisions."""

from pathlib import Path

import numpy as np
import pytest

from compiler.cache import BuildCache, stage_key
from compiler.gates import gate, mean_cosine, mean_kl, perplexity, require_all, top1_agreement
from compiler.recipe import parse_recipe
from compiler.targets import TARGETS_FOLDER, load_target, parse_target
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


def test_every_input_changes_the_key_of_a_stage() -> None:
    keys = {stage_key("a", {"x": 1}), stage_key("b", {"x": 1}), stage_key("a", {"x": 2}), stage_key("a", {"y": 1})}
    assert len(keys) == 4


def test_a_stage_is_built_once_and_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    cache = BuildCache(tmp_path)
    with pytest.raises(RuntimeError):
        cache.get_or_build("s", {}, lambda folder: (_ for _ in ()).throw(RuntimeError("no")))
    assert list(tmp_path.iterdir()) == []
    first = cache.get_or_build("s", {}, lambda folder: (folder / "f").write_text("once") and None)
    second = cache.get_or_build("s", {}, lambda folder: pytest.fail("built twice"))
    assert not first.was_cached
    assert second.was_cached
    assert (second.folder / "f").read_text() == "once"


def test_a_full_cache_drops_the_other_entries_and_keeps_the_new_one(tmp_path: Path) -> None:
    cache = BuildCache(tmp_path, max_bytes=10)
    cache.get_or_build("s", {"n": 1}, lambda folder: (folder / "f").write_bytes(b"x" * 8) and None)
    kept = cache.get_or_build("s", {"n": 2}, lambda folder: (folder / "f").write_bytes(b"x" * 8) and None)
    assert list(tmp_path.iterdir()) == [kept.folder]
