"""The pipeline on a small real classifier: verified artefacts or clear failures."""

from pathlib import Path

import numpy as np
import pytest

from compiler.cache import BuildCache
from compiler.compile_job import CompileJob
from compiler.pipeline import compile_model
from compiler.quantise import count_integer_kernels
from compiler.recipe import parse_recipe
from compiler.targets import load_target
from model_registry.chunking import describe_folder
from model_registry.manifest import parse_manifest
from model_registry.sources import hash_file
from tests.fakes.compiler_models import CLASSES, write_classifier
from wire.errors import GateFailedError, InvalidInputError, UnsupportedModelError

LENIENT = {"tensor": {"min_top1_agreement": 0.5, "min_cosine": 0.9, "gate_crops": 16, "calibration_crops": 16}}


def _job(
    tmp_path: Path, target: str = "cpu-x86", recipe: dict[str, object] | None = None, **more: object
) -> CompileJob:
    source = tmp_path / "classifier.onnx"
    if not source.exists():
        write_classifier(source)
    values: dict[str, object] = {
        "name": "small",
        "kind": "tensor",
        "target": load_target(target),
        "recipe": parse_recipe(recipe or LENIENT),
        "source_format": "onnx",
        "source": source,
        "source_digest": hash_file(Path(str(more.get("source", source)))),
    }
    return CompileJob(**(values | more))  # type: ignore[arg-type]


def shared_cache(tmp_path: Path) -> BuildCache:
    """Stages that tests of one run share: each is a function of what its key names, as it is for jobs."""
    return BuildCache(tmp_path.parent / "compiler-stages")


def _compile(job: CompileJob, tmp_path: Path, name: str = "out"):  # type: ignore[no-untyped-def]
    return compile_model(job, tmp_path / name, shared_cache(tmp_path), lambda *event: None)


def test_an_int8_artefact_runs_integer_kernels_and_passes_its_gates(tmp_path: Path) -> None:
    built = _compile(_job(tmp_path), tmp_path)
    assert built.manifest.precision == "int8"
    assert all(gate.passed for gate in built.manifest.gates)
    assert count_integer_kernels(built.folder / "model.onnx")[0] >= 2


def test_the_manifest_describes_the_folder_and_survives_parsing(tmp_path: Path) -> None:
    built = _compile(_job(tmp_path), tmp_path)
    assert parse_manifest(built.manifest.to_bytes()) == built.manifest
    assert describe_folder(built.folder) == built.manifest.files


def test_the_golden_set_holds_the_source_models_answers(tmp_path: Path) -> None:
    built = _compile(_job(tmp_path, "cpu-reference"), tmp_path)
    assert built.manifest.golden is not None
    with np.load(built.folder / built.manifest.golden.path) as arrays:
        assert arrays["output.logits"].shape == (built.manifest.golden.num_cases, CLASSES)


def test_compiling_twice_gives_the_same_manifest(tmp_path: Path) -> None:
    first = _compile(_job(tmp_path), tmp_path, "one")
    cold = compile_model(_job(tmp_path), tmp_path / "two", BuildCache(tmp_path / "other"), lambda *event: None)
    assert [f.digest for f in first.manifest.files if f.path == "model.onnx"] == [
        f.digest for f in cold.manifest.files if f.path == "model.onnx"
    ]


def test_a_gate_that_cannot_hold_fails_the_job_with_the_figures(tmp_path: Path) -> None:
    strict = {"tensor": {**LENIENT["tensor"], "min_cosine": 1.0, "float_rungs": [0]}}
    with pytest.raises(GateFailedError, match="cosine"):
        _compile(_job(tmp_path, recipe=strict), tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_broken_graph_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07not an onnx graph")
    with pytest.raises(UnsupportedModelError):
        _compile(_job(tmp_path, source=tmp_path / "bad.onnx"), tmp_path)


def test_a_golden_set_of_another_model_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", **{"input.picture": np.zeros((2, 3, 32, 32)), "output.logits": np.zeros((2, 10))})
    with pytest.raises(InvalidInputError, match="golden"):
        _compile(_job(tmp_path, golden=tmp_path / "golden.npz"), tmp_path)


def test_a_publishers_golden_set_is_shipped_as_it_is(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "golden.npz", **{"input.image": images, "output.logits": np.ones((3, CLASSES), np.float32)})
    built = _compile(_job(tmp_path, golden=tmp_path / "golden.npz"), tmp_path)
    assert (built.folder / "golden.npz").read_bytes() == (tmp_path / "golden.npz").read_bytes()


def test_the_publishers_data_calibrate_and_judge_in_place_of_photographs(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((32, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images)
    built = _compile(_job(tmp_path, data=tmp_path / "data.npz"), tmp_path)
    with np.load(built.folder / "golden.npz") as arrays:
        assert np.array_equal(arrays["input.image"], images[1:12:2])
    photographs = _compile(_job(tmp_path), tmp_path, "photographs")
    assert built.manifest.files != photographs.manifest.files


def test_data_of_another_model_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", picture=np.zeros((32, 3, 32, 32), np.float32))
    with pytest.raises(InvalidInputError, match="the data hold"):
        _compile(_job(tmp_path, data=tmp_path / "data.npz"), tmp_path)


def test_when_no_rung_holds_the_layers_that_must_stay_float_are_searched_for(tmp_path: Path) -> None:
    strict = {"tensor": {**LENIENT["tensor"], "min_cosine": 0.9997, "float_rungs": [0], "min_integer_layer_share": 0.3}}
    built = _compile(_job(tmp_path, recipe=strict), tmp_path)
    note = next(note for note in built.notes if "stay float" in note)
    assert note.startswith("1 of 3 layers stay float (5 tried): second")
    assert all(gate.passed for gate in built.manifest.gates)
    with pytest.raises(GateFailedError, match="cosine"):
        _compile(_job(tmp_path, recipe={"tensor": {**strict["tensor"], "search": False}}), tmp_path, "other")
