"""Tensors as they travel: the JSON and binary forms of the Open Inference Protocol, and images on their way in.

Binary extension: `Inference-Header-Content-Length` says how many bytes of the body are JSON; the tensors follow in
order, little endian, with `binary_data_size` in their parameters. Imported with the first request: it needs numpy.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from fastapi.responses import JSONResponse, Response

from edge_agent.engines import Engine
from edge_agent.runtimes.base import NUMPY_BY_DATATYPE, Array
from model_registry.manifest import Vision
from wire.errors import InvalidInputError, TooLargeError

MAX_BODY_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 50_000_000
TOP = 5
_DATATYPE_BY_NUMPY = {np.dtype(kind): name for name, kind in NUMPY_BY_DATATYPE.items()}


@dataclass(frozen=True)
class Asked:
    """A parsed inference request."""

    request_id: str | None
    inputs: dict[str, Array]
    outputs: list[str]
    binary: dict[str, bool]
    binary_by_default: bool


def prepare_image(data: bytes, vision: Vision) -> Array:
    """Resize the shorter side, crop the centre, normalise: float32 [1, 3, crop, crop]."""
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(data))
        if opened.width * opened.height > MAX_IMAGE_PIXELS:
            raise TooLargeError(f"the image has {opened.width} x {opened.height} pixels", remedy="send a smaller one")
        image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InvalidInputError("the body is no image that can be read", remedy="send PNG or JPEG") from error
    scale = vision.resize_pixels / min(image.size)
    size = tuple(max(vision.resize_pixels, round(side * scale)) for side in image.size)
    image = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    left, top = (image.width - vision.crop_pixels) // 2, (image.height - vision.crop_pixels) // 2
    image = image.crop((left, top, left + vision.crop_pixels, top + vision.crop_pixels))
    pixels = np.asarray(image, np.float32) / 255  # [crop, crop, 3]
    normal = (pixels - np.asarray(vision.mean, np.float32)) / np.asarray(vision.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])


def parse(data: bytes, header_length: str | None) -> Asked:
    """The request inside a body; raises `InvalidInputError`."""
    try:
        split = int(header_length) if header_length is not None else len(data)
        document = json.loads(data[:split])
        inputs, offset = {}, split
        for entry in document["inputs"]:
            size = entry.get("parameters", {}).get("binary_data_size")
            inputs[str(entry["name"])] = _tensor(entry, data[offset : offset + size] if size is not None else None)
            offset += size or 0
        wanted = document.get("outputs") or []
        return Asked(
            request_id=document.get("id"),
            inputs=inputs,
            outputs=[str(entry["name"]) for entry in wanted],
            binary={str(e["name"]): bool((e.get("parameters") or {}).get("binary_data", False)) for e in wanted},
            binary_by_default=bool((document.get("parameters") or {}).get("binary_data_output", False)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise InvalidInputError(f"the inference request is malformed: {error}", remedy="see the v2 protocol") from error


def _tensor(entry: dict[str, Any], binary: bytes | None) -> Array:
    datatype, shape = entry["datatype"], [int(length) for length in entry["shape"]]
    if datatype not in NUMPY_BY_DATATYPE:
        raise InvalidInputError(f"datatype {datatype!r} is not supported", remedy=", ".join(NUMPY_BY_DATATYPE))
    kind = np.dtype(NUMPY_BY_DATATYPE[datatype])
    if any(length < 0 for length in shape) or math.prod(shape) * kind.itemsize > MAX_BODY_BYTES:
        raise InvalidInputError(f"shape {shape} is not possible", remedy="send what the metadata says")
    flat = np.frombuffer(binary, kind) if binary is not None else np.asarray(entry["data"], kind).reshape(-1)
    if flat.size != math.prod(shape):
        raise InvalidInputError(f"{entry['name']!r} has {flat.size} values", remedy=f"shape {shape} wants other")
    return flat.reshape(shape)


def respond(asked: Asked, outputs: dict[str, Array], name: str, engine: Engine, headers: dict[str, str]) -> Response:
    """Outputs in the form that was asked for."""
    described, blobs = [], []
    for output, value in outputs.items():
        entry: dict[str, Any] = {
            "name": output,
            "datatype": _DATATYPE_BY_NUMPY.get(value.dtype, "FP32"),
            "shape": list(value.shape),
        }
        if asked.binary.get(output, asked.binary_by_default):
            blob = np.ascontiguousarray(value).tobytes()
            blobs.append(blob)
            entry["parameters"] = {"binary_data_size": len(blob)}
        else:
            entry["data"] = [_json_number(number) for number in value.reshape(-1).tolist()]
        described.append(entry)
    body: dict[str, Any] = {"model_name": name, "model_version": engine.slot.version, "outputs": described}
    if asked.request_id:
        body["id"] = asked.request_id
    if not blobs:
        return JSONResponse(body, headers=headers)
    head = json.dumps(body).encode()
    headers = {**headers, "inference-header-content-length": str(len(head))}
    return Response(b"".join([head, *blobs]), media_type="application/octet-stream", headers=headers)


def _json_number(number: Any) -> Any:
    return None if isinstance(number, float) and not math.isfinite(number) else number


def rank(logits: Array, vision: Vision) -> list[dict[str, Any]]:
    """The best labels of one image with their probabilities."""
    scores = _softmax(logits[0].astype(np.float64).reshape(-1))
    best = np.argsort(-scores)[:TOP]
    return [{"label": _label(vision, int(at)), "index": int(at), "score": float(scores[at])} for at in best]


def is_finite(values: Iterable[Array]) -> bool:
    """Whether every floating point number is one."""
    return all(np.isfinite(value).all() for value in values if value.dtype.kind == "f")


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return cast(Array, powers / powers.sum())


def _label(vision: Vision, index: int) -> str:
    return vision.labels[index] if index < len(vision.labels) else str(index)
