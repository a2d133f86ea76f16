"""A tensor model on disk: what its graph takes and gives, running it, and cleaning it.

Everything is measured through ONNX Runtime on the CPU with one session per file. `Arithmetic` says whose numbers are
wanted of an 8-bit graph: those of this processor's integer kernels, or those that its Q/DQ nodes define, in floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model_registry.manifest import Vision
from wire.errors import UnsupportedModelError

Array = np.ndarray[Any, Any]
Arithmetic = Literal["kernels", "definition"]
BATCH = 8


@dataclass(frozen=True)
class Signature:
    """The graph's inputs and outputs; a free axis is None."""

    inputs: dict[str, tuple[int | None, ...]]
    outputs: tuple[str, ...]
    types: dict[str, str]

    @property
    def image_input(self) -> str | None:
        """The name of the input if it is the only one and takes RGB images [batch, 3, height, width] of float32."""
        if len(self.inputs) != 1:
            return None
        (name, shape), *_ = self.inputs.items()
        is_image = len(shape) == 4 and shape[1] == 3 and self.types[name] == "tensor(float)"
        return name if is_image else None

    def to_dict(self) -> dict[str, Any]:
        """As a stage's result holds it."""
        return {"inputs": self.inputs, "outputs": self.outputs, "types": self.types}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Signature:
        """What `to_dict` gave."""
        inputs = {name: tuple(shape) for name, shape in document["inputs"].items()}
        return cls(inputs, tuple(document["outputs"]), dict(document["types"]))


def open_session(path: Path, arithmetic: Arithmetic = "kernels") -> Any:
    """An ONNX Runtime session on the CPU. A graph that it refuses raises `UnsupportedModelError`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if arithmetic == "definition":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        text = str(error).strip().splitlines()[0][:300]
        raise UnsupportedModelError(
            f"ONNX Runtime refuses {path.name}: {text}", remedy="export the model again"
        ) from error


def read_signature(path: Path) -> Signature:
    """What the model at `path` takes and gives."""
    session = open_session(path)
    inputs = {
        i.name: tuple(size if isinstance(size, int) and size > 0 else None for size in i.shape)
        for i in session.get_inputs()
    }
    types = {i.name: i.type for i in session.get_inputs()}
    return Signature(inputs, tuple(o.name for o in session.get_outputs()), types)


def fit_vision(signature: Signature, vision: Vision | None, default: Vision) -> Vision | None:
    """How images become this model's input: as the publisher says, else `default` at the graph's size, else None."""
    if vision is not None or signature.image_input is None:
        return vision
    side = signature.inputs[signature.image_input][2] or default.crop_pixels
    return default.model_copy(update={"crop_pixels": side, "resize_pixels": round(side * 256 / 224)})


def run_batches(path: Path, inputs: dict[str, Array], arithmetic: Arithmetic = "kernels") -> dict[str, Array]:
    """All outputs for `inputs`, whose first axis is cut into batches that the graph accepts."""
    session = open_session(path, arithmetic)
    names = [output.name for output in session.get_outputs()]
    first = session.get_inputs()[0].shape[0]
    batch = first if isinstance(first, int) and first > 0 else BATCH
    total = len(next(iter(inputs.values())))
    pieces = [
        session.run(names, {name: array[start : start + batch] for name, array in inputs.items()})
        for start in range(0, total - total % batch if isinstance(first, int) else total, batch)
    ]
    return {name: np.concatenate([piece[index] for piece in pieces]) for index, name in enumerate(names)}


def random_inputs(signature: Signature, num_cases: int) -> dict[str, Array]:
    """Seeded inputs for a model that does not take images: normal floats, zeros for integers; free axes become 1."""
    random = np.random.default_rng(11)
    found: dict[str, Array] = {}
    for name, shape in signature.inputs.items():
        sizes = (shape[0] or num_cases, *(size or 1 for size in shape[1:])) if shape else ()
        if signature.types[name] == "tensor(float)":
            found[name] = random.standard_normal(sizes).astype(np.float32)
        elif signature.types[name] in ("tensor(int64)", "tensor(int32)"):
            found[name] = np.zeros(sizes, np.int64 if "64" in signature.types[name] else np.int32)
        else:
            raise UnsupportedModelError(
                f"input {name!r} has type {signature.types[name]}",
                remedy="float32, int32 and int64 inputs can be judged",
            )
    return found


def clean(source: Path, out: Path) -> None:
    """Write the checked and simplified graph of `source` to `out` as one file."""
    import onnx
    import onnxslim
    from google.protobuf.message import DecodeError

    from compiler.opsets import drop_unused_opsets

    try:
        model = onnx.load(str(source))
        onnx.checker.check_model(model)
        slim = onnxslim.slim(model)
    except (onnx.checker.ValidationError, DecodeError, ValueError, RuntimeError, OSError) as error:
        raise UnsupportedModelError(
            f"{source.name} is not a sound ONNX graph: {error}", remedy="export it again"
        ) from error
    drop_unused_opsets(slim)
    onnx.save(slim, str(out))
