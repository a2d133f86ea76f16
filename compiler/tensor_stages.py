"""The stages of tensor models. Each function names all that decides its result and imports its tools when it builds.

clean -> (inputs, answers) -> calibrate -> quantise, or cast -> measure; golden. A stage takes earlier results by their
content, so equal intermediate results share all that follows, whichever model, recipe or target led to them.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler import tensor_model
from compiler.cache import Built, Stage
from compiler.modelopt import ModelOpt
from compiler.processor import tensor_kernels
from compiler.targets import TensorScheme
from compiler.tensor_model import Arithmetic, Array, Signature
from compiler.workshop import Workshop
from model_registry.manifest import Vision
from model_registry.sources import hash_file
from wire.errors import InvalidInputError

MODEL = "model.onnx"
LAYERS = "layers.json"
GOLDEN = "golden.npz"
MAX_GOLDEN_BYTES = 256 << 20
MAX_DATA_BYTES = 2 << 30
MIN_CASES = 16
NUM_GOLDEN_CASES = 6
_PHOTOGRAPH_TOOLS = ("numpy", "pillow", "scikit-image", "scikit-learn")
_QUANTISER_TOOLS = ("numpy", "onnx", "onnxruntime")


@dataclass(frozen=True)
class TensorSource:
    """A tensor model in work: the file as it came, its name in keys, the cleaned graph, and typical inputs."""

    path: Path
    fingerprint: str
    cleaned: Built
    signature: Signature
    vision: Vision | None
    data: Path | None = None

    @property
    def is_image_model(self) -> bool:
        """Whether photographs can be its input."""
        return self.vision is not None and self.signature.image_input is not None

    @property
    def can_calibrate(self) -> bool:
        """Whether there are inputs whose ranges mean something."""
        return self.data is not None or self.is_image_model


def import_program(shop: Workshop, path: Path, source_digest: str) -> Built:
    """The torch.export program as an ONNX file."""

    def build(to: Path) -> None:
        from compiler import pt2_import

        pt2_import.import_pt2(path, to / MODEL)

    tools = ("onnx", "onnxscript", "torch")
    return shop.run(Stage("import", {"source": source_digest}, tools, build), "turning the program into ONNX")


def clean(shop: Workshop, path: Path, fingerprint: str) -> Built:
    """The checked, simplified graph and what it takes and gives."""

    def build(to: Path) -> None:
        tensor_model.clean(path, to / MODEL)
        signature = tensor_model.read_signature(path)
        (to / "signature.json").write_text(json.dumps(signature.to_dict()))

    tools = ("onnx", "onnxruntime", "onnxslim")
    return shop.run(
        Stage("clean", {"model": fingerprint}, tools, build, version=2), "checking and simplifying the graph"
    )


def inputs(shop: Workshop, source: TensorSource, split: str, count: int) -> Built:
    """Inputs as .npz for a split: "calibration", "held-out" or "golden". What calibrates never judges.

    The publisher's data if there are any; else `count` crops of photographs (whole ones for "golden"); a model that
    takes no images gets seeded numbers.
    """
    signature, vision = source.signature, source.vision
    if source.data is not None:
        return _given_inputs(shop, source.data, signature, split)
    if not source.is_image_model:
        decided: dict[str, Any] = {"signature": signature.to_dict(), "count": count}

        def build(to: Path) -> None:
            _save(to / "inputs.npz", tensor_model.random_inputs(signature, count))

        return shop.run(Stage("inputs", decided, ("numpy",), build), "drawing inputs")
    assert vision is not None
    pixels = vision.model_dump(mode="json", exclude={"labels"})
    decided = {"split": split, "count": count, "pixels": pixels, "name": signature.image_input}

    def build_images(to: Path) -> None:
        from compiler import photographs

        if split == "golden":
            images = photographs.whole_images("held-out", vision)
        else:
            images = photographs.augmented_crops("held-out" if split == "held-out" else "calibration", count, vision)
        _save(to / "inputs.npz", {str(signature.image_input): images})

    return shop.run(Stage("inputs", decided, _PHOTOGRAPH_TOOLS, build_images), f"cutting {split} photographs")


def _given_inputs(shop: Workshop, data: Path, signature: Signature, split: str) -> Built:
    """Even cases of the publisher's data calibrate, odd ones judge, the first few of those are the golden set."""
    if data.stat().st_size > MAX_DATA_BYTES:
        raise InvalidInputError(f"the data have {data.stat().st_size} bytes", remedy=f"at most {MAX_DATA_BYTES}")
    decided = {"data": hash_file(data), "split": split, "signature": signature.to_dict()}

    def build(to: Path) -> None:
        arrays = load(data)
        lengths = {name: len(array) for name, array in arrays.items()}
        if set(arrays) != set(signature.inputs) or len(set(lengths.values())) != 1 or min(lengths.values()) < MIN_CASES:
            raise InvalidInputError(
                f"the data hold {sorted(lengths.items())}",
                remedy=f"wanted: {sorted(signature.inputs)}, the same number of cases each, at least {MIN_CASES}",
            )
        cases = slice(0, None, 2) if split == "calibration" else slice(1, None, 2)
        chosen = {name: array[cases] for name, array in arrays.items()}
        if split == "golden":
            chosen = {name: array[:NUM_GOLDEN_CASES] for name, array in chosen.items()}
        _save(to / "inputs.npz", chosen)

    return shop.run(Stage("inputs", decided, ("numpy",), build), f"taking {split} cases of the data")


def answers(shop: Workshop, source: TensorSource, given: Built) -> Built:
    """What the source model, as it came, answers to `given`."""
    decided = {"model": source.fingerprint, "inputs": given.digest, "machine": platform.machine()}

    def build(to: Path) -> None:
        _save(to / "answers.npz", tensor_model.run_batches(source.path, load(given.path("inputs.npz"))))

    return shop.run(Stage("answers", decided, ("onnxruntime",), build), "the source model answers")


def calibrate(shop: Workshop, cleaned: Built, samples: Built) -> Built:
    """The ranges of all values of the graph, for every scheme."""
    decided = {"model": cleaned.files[MODEL], "samples": samples.digest, "machine": platform.machine()}

    def build(to: Path) -> None:
        from compiler import quantise as tool

        tool.calibrate(cleaned.path(MODEL), to, load(samples.path("inputs.npz")))

    return shop.run(Stage("calibrate", decided, _QUANTISER_TOOLS, build, version=2), "collecting ranges")


def quantise(shop: Workshop, calibrated: Built, scheme: TensorScheme, floats: int | Sequence[str]) -> Built:
    """8 bits by ONNX Runtime's quantiser; the first so many layers, or the named ones, stay float to the next one."""
    parts = scheme.model_dump(include={"activations", "reduce_range", "quantise_bias"})
    named = floats if isinstance(floats, int) else sorted(floats)
    decided = {"calibrated": calibrated.digest, "scheme": parts, "float_layers": named}

    def build(to: Path) -> None:
        from compiler import quantise as tool
        from compiler.opsets import strip_file

        tool.quantise(calibrated.folder, to / MODEL, scheme, tool.float_nodes(calibrated.folder, floats))
        strip_file(to / MODEL)

    num_floats = floats if isinstance(floats, int) else len(floats)
    return shop.run(
        Stage("quantise", decided, _QUANTISER_TOOLS, build, version=2), f"8 bits, {num_floats} layers float"
    )


def quantise_by_modelopt(shop: Workshop, cleaned: Built, samples: Built, precision: str, tool: ModelOpt) -> Built:
    """int8 or fp8 by NVIDIA's Model Optimizer in its own environment, calibrated on the same samples."""
    decided = {
        "model": cleaned.files[MODEL],
        "samples": samples.digest,
        "precision": precision,
        "modelopt": tool.version,
    }

    def build(to: Path) -> None:
        from compiler.opsets import strip_file

        tool.quantise(cleaned.path(MODEL), samples.path("inputs.npz"), to / MODEL, precision)
        strip_file(to / MODEL)

    stage = Stage("quantise", decided, ("onnx", "onnxruntime"), build, version=3, reproducibility="output-equivalent")
    return shop.run(stage, f"{precision} by ModelOpt {tool.version}")


def cast(shop: Workshop, cleaned: Built) -> Built:
    """fp16 weights and arithmetic, float32 at the rim."""

    def build(to: Path) -> None:
        from compiler import quantise as tool
        from compiler.opsets import strip_file

        tool.cast_to_half(cleaned.path(MODEL), to / MODEL)
        strip_file(to / MODEL)

    stage = Stage("cast", {"model": cleaned.files[MODEL]}, ("onnx", "onnxruntime"), build, version=2)
    return shop.run(stage, "casting to fp16")


def measure(
    shop: Workshop, model: Built, given: Built, expected: Built, kernels: str, *, is_8_bit: bool
) -> dict[str, float]:
    """Figures of an artefact against the source (`metrics.tensor_figures`) and, for 8 bits, integer and float layers.

    `kernels` names the target's arithmetic; where this machine has another, the graph's own definition is judged.
    Layers of a GPU's graph are counted by its Q/DQ nodes, those of a processor's in the graph that ONNX Runtime makes.
    """
    arithmetic: Arithmetic = "kernels" if kernels == tensor_kernels() else "definition"
    decided = {
        "model": model.files[MODEL],
        "inputs": given.digest,
        "expected": expected.digest,
        "arithmetic": tensor_kernels() if arithmetic == "kernels" else arithmetic,
        "layers": ("nodes" if kernels == "gpu" else "kernels") if is_8_bit else None,
        "machine": platform.machine(),
    }

    def build(to: Path) -> None:
        from compiler.metrics import tensor_figures
        from compiler.quantise import count_integer_kernels, count_quantised_layers
        from compiler.soundness import count_broken_numbers

        found = tensor_model.run_batches(model.path(MODEL), load(given.path("inputs.npz")), arithmetic)
        wanted = load(expected.path("answers.npz"))
        name = next(iter(wanted))
        figures = tensor_figures(wanted[name], found[name])
        figures["broken_numbers"] = count_broken_numbers(model.path(MODEL))
        if is_8_bit:
            count = count_quantised_layers if kernels == "gpu" else count_integer_kernels
            figures["integer_layers"], figures["float_layers"] = count(model.path(MODEL))
        (to / "figures.json").write_text(json.dumps(figures))

    stage = Stage("measure", decided, ("numpy", "onnx", "onnxruntime"), build, version=3)
    built = shop.run(stage, "comparing with the source model")
    return dict(built.read_json("figures.json"))


def golden(shop: Workshop, source: TensorSource, given: Path | None) -> Built:
    """The golden set: the publisher's as it is, once it fits the model, or else the source's answers."""
    if given is not None:
        if given.stat().st_size > MAX_GOLDEN_BYTES:
            raise InvalidInputError(
                f"golden set has {given.stat().st_size} bytes", remedy=f"at most {MAX_GOLDEN_BYTES}"
            )
        decided: dict[str, Any] = {"given": hash_file(given), "signature": source.signature.to_dict()}

        def build_given(to: Path) -> None:
            num_cases = _check_golden(given, source.signature)
            shutil.copyfile(given, to / GOLDEN)
            (to / "cases.json").write_text(json.dumps(num_cases))

        return shop.run(Stage("golden", decided, ("numpy",), build_given), "checking the golden set")
    whole = inputs(shop, source, "golden", 4)
    replies = answers(shop, source, whole)
    decided = {"inputs": whole.digest, "answers": replies.digest}

    def build(to: Path) -> None:
        taken = load(whole.path("inputs.npz"))
        arrays = {f"input.{name}": value for name, value in taken.items()}
        arrays |= {f"output.{name}": value for name, value in load(replies.path("answers.npz")).items()}
        _save(to / GOLDEN, arrays)
        (to / "cases.json").write_text(json.dumps(len(next(iter(taken.values())))))

    return shop.run(Stage("golden", decided, ("numpy",), build), "writing golden inputs and outputs")


def load(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name; never a pickle."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _save(path: Path, arrays: dict[str, Array]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _check_golden(path: Path, signature: Signature) -> int:
    """The number of cases in the publisher's golden set, which must fit the model."""
    try:
        lengths = {name: len(array) for name, array in load(path).items()}
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InvalidInputError(f"golden set cannot be read: {error}", remedy="write it with numpy.savez") from error
    wanted = {f"input.{name}" for name in signature.inputs}
    known = wanted | {f"output.{name}" for name in signature.outputs}
    has_output = any(name.startswith("output.") for name in lengths)
    if not wanted <= set(lengths) or set(lengths) - known or not has_output or len(set(lengths.values())) != 1:
        raise InvalidInputError(
            f"golden set holds {sorted(lengths.items())}",
            remedy=f"wanted: {sorted(known)}, the same number of cases each",
        )
    return next(iter(lengths.values()))
