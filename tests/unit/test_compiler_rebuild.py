"""What a stage's record promises about a rebuild is true, and a warm build builds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.cache import BuildCache
from compiler.many import TargetResult, compile_targets, hash_remembered
from compiler.recipe import parse_recipe
from compiler.source_memo import SourceMemo
from compiler.targets import load_targets
from tests.fakes.compiler_models import write_classifier
from tests.unit.test_compiler_pipeline import LENIENT

TARGETS = "cpu-x86,cpu-x86-vnni,cuda,jetson-orin,rtx,rtx-sm86,rtx-sm89,rtx-sm120"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_classifier(folder / "classifier.onnx")
    return folder


def _compile(folder: Path, name: str, cache: BuildCache) -> list[TargetResult]:
    source, recipe = folder / "classifier.onnx", parse_recipe({**LENIENT, "max_size_ratio": 5})
    results = compile_targets(source, load_targets(TARGETS), recipe, folder / name, cache, lambda *event: None)
    assert [result.error for result in results] == [None] * len(results)
    return results


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[BuildCache, list[TargetResult]]:
    cache = BuildCache(folder / "cache")
    return cache, _compile(folder, "first", cache)


def _records(cache: BuildCache) -> dict[str, dict[str, int]]:
    """Sizes by file by stage entry."""
    return {
        entry.name: {file.name: file.stat().st_size for file in entry.rglob("*") if file.name != "stage.json"}
        for entry in cache.root.iterdir()
        if entry.is_dir()
    }


def test_stages_are_built_once_for_all_targets(first: tuple[BuildCache, list[TargetResult]]) -> None:
    built = [s for r in first[1] if r.artefact for s in r.artefact.stages if not s.was_cached]
    assert len({stage.key for stage in built}) == len(built)
    assert sum(stage.stage == "calibrate" for stage in built) == 1
    assert sum(stage.stage == "cast" for stage in built) == 1
    assert sum(stage.stage == "engine" for stage in built) == 4


def test_a_rebuild_keeps_the_promise_of_every_stage(folder: Path, first: tuple[BuildCache, list[TargetResult]]) -> None:
    again = BuildCache(folder / "again")
    _compile(folder, "second", again)
    by_key = {s.key: s for r in first[1] if r.artefact for s in r.artefact.stages}
    classes = {"byte-identical": 0, "output-equivalent": 0}
    for entry in sorted(path for path in again.root.iterdir() if path.is_dir()):
        before, after = first[0].root / entry.name, entry
        stage = next(stage for key, stage in by_key.items() if entry.name == f"{stage.stage}-{key[:40]}")
        classes[stage.reproducibility] += 1
        for file in after.rglob("*"):
            if file.name == "stage.json":
                continue
            twin = before / file.relative_to(after)
            if stage.reproducibility == "byte-identical":
                assert twin.read_bytes() == file.read_bytes(), (stage.stage, file.name)
            else:
                assert abs(twin.stat().st_size - file.stat().st_size) <= 0.01 * file.stat().st_size
    assert set(_records(again)) == set(_records(first[0]))
    assert min(classes.values()) > 0


def test_a_warm_build_builds_nothing_and_gives_the_same_manifests(
    folder: Path, first: tuple[BuildCache, list[TargetResult]]
) -> None:
    warm = _compile(folder, "warm", first[0])
    assert all(stage.was_cached for result in warm if result.artefact for stage in result.artefact.stages)
    assert [r.artefact.manifest.digest for r in warm if r.artefact] == [
        r.artefact.manifest.digest for r in first[1] if r.artefact
    ]


def test_a_file_that_changed_is_hashed_again_and_one_that_just_changed_is_not_remembered(tmp_path: Path) -> None:
    source = write_classifier(tmp_path / "m.onnx")
    cache = BuildCache(tmp_path / "cache")
    before = hash_remembered(source, cache).digest
    write_classifier(source, seed=1)
    assert hash_remembered(source, cache).digest != before
    memo = SourceMemo(tmp_path / "memo.json", clock_ns=lambda: source.stat().st_mtime_ns + 10**10)
    digest = memo.digest(source)
    stat = source.stat()
    memo._known[str(source.resolve())][-1] = "remembered"
    assert memo.digest(source) == "remembered"
    write_classifier(source, seed=2)
    assert source.stat().st_mtime_ns != stat.st_mtime_ns
    assert memo.digest(source) not in (digest, "remembered")
