"""Nothing worse than promised is published: seeded faults in really compiled artefacts, and good ones that must pass.

MobileNetV2 is quantised here and SmolLM2-135M taken as it was built; each fault edits the very graph that would be
published, and the gates judge it with the recipe's own limits. `FORESHORE_FAULTS=all` runs every fault and every good
artefact; otherwise a seeded sample.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler import language_model, photographs, prompt_set, quantise, tensor_model
from compiler.gates import language_gates, require_all, tensor_gates
from compiler.metrics import language_figures, tensor_figures
from compiler.recipe import LanguageRecipe, TensorRecipe
from compiler.soundness import count_broken_numbers
from compiler.targets import TensorScheme
from tests.fakes.language_artefact import MODELS, SOURCE, built_language_model, held_answers
from tests.faults import compiled_faults as faults
from wire.errors import ForeshoreError

pytestmark = [
    pytest.mark.models,
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE.is_dir(), reason="models not fetched"),
]
EVERYTHING = os.environ.get("FORESHORE_FAULTS") == "all"
SAMPLE = random.Random(20261125)
MOBILENET = MODELS / "mobilenet_v2.onnx"
U8 = TensorScheme(precision="int8")
S8 = TensorScheme(precision="int8", activations="int8", quantise_bias=False)
SEVEN_BITS = TensorScheme(precision="int8", reduce_range=True)
FLOAT_LAYERS = 5

Make = Callable[[Path], Path]


@dataclass(frozen=True)
class Vision:
    """A judged classifier: calibrated graphs by calibration set, a good artefact, and the source's answers."""

    calibrated: tuple[Path, ...]
    good: Path
    inputs: dict[str, Any]
    expected: Any

    def judge(self, path: Path) -> None:
        """Raise what a compile job would end with."""
        found = next(iter(tensor_model.run_batches(path, self.inputs).values()))
        figures = tensor_figures(self.expected, found) | {"broken_numbers": count_broken_numbers(path)}
        require_all(tensor_gates(figures, TensorRecipe()))


@dataclass(frozen=True)
class Language:
    """A judged language model: the artefact and what its source says."""

    good: Path
    held: language_model.Held

    def judge(self, folder: Path) -> None:
        """Raise what a compile job would end with."""
        held = self.held
        figures = language_figures(held.logits, language_model.artefact_logits(folder, held.tokens), held.tokens)
        answers = prompt_set.ask_artefact(folder, held.answers.prompts)
        figures |= prompt_set.prompt_figures(held.answers, answers)
        figures["broken_numbers"] = count_broken_numbers(folder / "model.onnx")
        require_all(language_gates(figures, LanguageRecipe()))


def calibrate(folder: Path, samples: Any, source: Path = MOBILENET) -> Path:
    folder.mkdir()
    quantise.calibrate(source, folder, {"image": samples})
    return folder


def quantised(calibrated: Path, out: Path, scheme: TensorScheme = U8, num_floats: int = FLOAT_LAYERS) -> Path:
    quantise.quantise(calibrated, out, scheme, quantise.float_nodes(calibrated, num_floats))
    return out


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    folder = tmp_path_factory.mktemp("vision")
    samples = photographs.augmented_crops("calibration", 48 if EVERYTHING else 24)
    sets = [samples, samples[8:32], samples[24:]] if EVERYTHING else [samples]
    calibrated = tuple(calibrate(folder / f"set{index}", one) for index, one in enumerate(sets))
    inputs = {"image": photographs.augmented_crops("held-out", 96 if EVERYTHING else 48)}
    expected = next(iter(tensor_model.run_batches(MOBILENET, inputs).values()))
    return Vision(calibrated, quantised(calibrated[0], folder / "good.onnx"), inputs, expected)


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(built_language_model(), held_answers(512 if EVERYTHING else 256))


def vision_faults(vision: Vision) -> dict[str, Make]:
    def edit(change: faults.Edit) -> Make:
        return lambda folder: faults.edited(vision.good, folder / "fault.onnx", change)

    def calibrated_on(samples: Any) -> Make:
        return lambda folder: quantised(calibrate(folder / "set", samples), folder / "fault.onnx")

    def truncated(folder: Path) -> Path:
        (folder / "fault.onnx").write_bytes(vision.good.read_bytes()[:-200_000])
        return folder / "fault.onnx"

    found = {name: edit(change) for name, change in faults.VISION.items()}
    found["no calibration at all"] = calibrated_on(vision.inputs["image"][:0])
    found["calibrated on black pictures"] = calibrated_on(np.zeros((16, 3, 224, 224), np.float32))
    found["truncated file"] = truncated
    found["another training's weights"] = lambda folder: MODELS / "mobilenet_v2_bad.onnx"
    return found


def language_faults(language: Language) -> dict[str, Make]:
    def edit(change: faults.Edit) -> Make:
        return lambda folder: faults.edited_folder(language.good, folder / "fault", change)

    found = {name: edit(change) for name, change in faults.LANGUAGE.items()}
    found["tokenizer of another model"] = lambda folder: faults.wrong_tokenizer(language.good, folder / "fault")
    found["weights cut short"] = lambda folder: faults.cut_weights(language.good, folder / "fault")
    return found


def vision_good(vision: Vision) -> dict[str, Make]:
    def make(calibrated: Path, scheme: TensorScheme, num_floats: int) -> Make:
        return lambda folder: quantised(calibrated, folder / "good.onnx", scheme, num_floats)

    def half(folder: Path) -> Path:
        quantise.cast_to_half(MOBILENET, folder / "good.onnx")
        return folder / "good.onnx"

    def clean(folder: Path) -> Path:
        tensor_model.clean(MOBILENET, folder / "good.onnx")
        return folder / "good.onnx"

    found: dict[str, Make] = {
        "fp16": half,
        "fp32, simplified": clean,
        "8 bits, as compiled": lambda folder: vision.good,
    }
    for index, calibrated in enumerate(vision.calibrated):
        for name, scheme in (("u8s8", U8), ("s8s8", S8), ("7 bits", SEVEN_BITS)):
            for num_floats in (12, 24, 36) if name != "7 bits" else (24,):
                found[f"{name}, set {index}, {num_floats} layers float"] = make(calibrated, scheme, num_floats)
    return found


def language_good(language: Language) -> dict[str, Make]:
    def built(precision: str) -> Make:
        def make(folder: Path) -> Path:
            language_model.build_genai(SOURCE, folder / "good", precision)
            return folder / "good"

        return make

    return {"int4, as built": lambda folder: language.good, "int8": built("int8")}


def refusals(makes: Iterable[tuple[str, Make]], judge: Callable[[Path], None], folder: Path) -> dict[str, str]:
    """Why each artefact was not published; those that would have been are absent."""
    found: dict[str, str] = {}
    for name, make in makes:
        work = folder / "work"
        work.mkdir()
        try:
            judge(make(work))
        except ForeshoreError as error:
            found[name] = str(error)
        except Exception as error:  # noqa: BLE001 - a tool that fails is a failed job, and so told
            found[name] = f"{type(error).__name__}: {str(error)[:80]}"
        shutil.rmtree(work)
        sys.stdout.write(f"{name}: {found.get(name, 'published')}\n")
    return found


def chosen(makes: dict[str, Make], count: int) -> list[tuple[str, Make]]:
    return list(makes.items()) if EVERYTHING else SAMPLE.sample(sorted(makes.items()), count)


def test_no_broken_classifier_is_published(vision: Vision, tmp_path: Path) -> None:
    makes = chosen(vision_faults(vision), 5)
    refused = refusals(makes, vision.judge, tmp_path)
    assert not {name for name, _ in makes} - set(refused)


def test_no_broken_language_model_is_published(language: Language, tmp_path: Path) -> None:
    makes = chosen(language_faults(language), 1)
    refused = refusals(makes, language.judge, tmp_path)
    assert not {name for name, _ in makes} - set(refused)


def test_good_classifiers_are_published(vision: Vision, tmp_path: Path) -> None:
    makes = chosen(vision_good(vision), 3)
    assert len(refusals(makes, vision.judge, tmp_path)) <= 1


def test_good_language_models_are_published(language: Language, tmp_path: Path) -> None:
    makes = list(language_good(language).items())[: None if EVERYTHING else 1]
    assert refusals(makes, language.judge, tmp_path) == {}
