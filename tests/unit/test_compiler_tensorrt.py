"""Engines are really built, without a GPU, by TensorRT-RTX."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.targets import EngineTarget, load_target
from compiler.tensorrt import Builder, NoBuilder, build_engine, find_builder
from tests.fakes.compiler_models import write_classifier
from tests.unit.test_compiler_pipeline import _compile, _job
from wire.errors import UnsupportedModelError

LENIENT = {"tensor": {"gate_crops": 16}, "max_size_ratio": 3.0}


@pytest.fixture(scope="module")
def builder() -> Builder:
    found = find_builder("tensorrt-rtx")
    assert isinstance(found, Builder), found
    return found


def test_an_rtx_artefact_carries_an_engine_for_three_capabilities(tmp_path: Path) -> None:
    built = _compile(_job(tmp_path, "rtx", LENIENT), tmp_path)
    engine = built.manifest.engine
    assert engine is not None
    assert engine.compute_capabilities == ["8.6", "8.9", "12.0"]
    assert (built.folder / engine.path).stat().st_size > 10_000
    assert built.manifest.entry == "model.onnx"


def test_a_jetson_artefact_says_why_it_carries_none(tmp_path: Path) -> None:
    built = _compile(_job(tmp_path, "jetson-orin"), tmp_path)
    assert built.manifest.engine is None
    assert "tensorrt" in json.loads((built.folder / "recipe.json").read_text())["engine_not_built"]


def test_a_graph_that_tensorrt_does_not_take_is_refused_in_the_parsers_words(builder: Builder, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x08 not a graph")
    with pytest.raises(UnsupportedModelError, match="does not take the graph"):
        build_engine(builder, load_target("rtx").engine, broken, tmp_path / "engine")  # type: ignore[arg-type]
    assert not (tmp_path / "engine").exists()


def test_a_capability_that_the_builder_does_not_know_is_named(builder: Builder, tmp_path: Path) -> None:
    write_classifier(tmp_path / "small.onnx")
    target = EngineTarget(builder="tensorrt-rtx", compute_capabilities=["9.0"])
    with pytest.raises(UnsupportedModelError, match=r"9\.0"):
        build_engine(builder, target, tmp_path / "small.onnx", tmp_path / "engine")


def test_a_builder_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compiler.tensorrt.MODULES", {"tensorrt-rtx": ("no_such_package",)})
    found = find_builder("tensorrt-rtx")
    assert isinstance(found, NoBuilder)
    assert "foreshore[tensorrt]" in found.reason
