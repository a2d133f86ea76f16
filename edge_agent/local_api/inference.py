"""Open Inference Protocol (KServe v2) for tensors, with the binary extension, and `/v1/classify` for images.

Binary extension: `Inference-Header-Content-Length` says how many bytes of the body are JSON; the tensors follow in
order, little endian, with `binary_data_size` in their parameters.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from edge_agent.engines import Engine
from edge_agent.local_api.context import Context
from edge_agent.runtimes.base import NUMPY_BY_DATATYPE, Array, TensorRuntime, TensorSpec
from model_registry.manifest import Vision
from wire.errors import InvalidInputError, NotFoundError, TooLargeError, UnavailableError

MAX_BODY_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 50_000_000
TOP = 5
_DATATYPE_BY_NUMPY = {np.dtype(kind): name for name, kind in NUMPY_BY_DATATYPE.items()}


@dataclass(frozen=True)
class _Asked:
    """A parsed inference request."""

    request_id: str | None
    inputs: dict[str, Array]
    outputs: list[str]
    binary: dict[str, bool]
    binary_by_default: bool


def router(context: Context) -> APIRouter:
    """The `/v2` routes and `/v1/classify`."""
    routes = APIRouter()

    @routes.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "foreshore-agent", "version": "0.1.0", "extensions": ["binary_tensor_data"]}

    @routes.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @routes.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @routes.get("/v2/models/{name}/ready")
    @routes.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        _find(context, name, version)
        return {"name": name, "ready": True}

    @routes.get("/v2/models/{name}")
    @routes.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        engine = _find(context, name, version)
        runtime = cast(TensorRuntime, engine.runtime)
        return {
            "name": name,
            "versions": [engine.slot.version],
            "platform": f"{runtime.name}_onnx",
            "inputs": [_described(spec) for spec in runtime.inputs],
            "outputs": [_described(spec) for spec in runtime.outputs],
        }

    @routes.post("/v2/models/{name}/infer")
    @routes.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(name: str, request: Request, version: str | None = None) -> Response:
        _find(context, name, version)
        asked = _parse(await _body(request), request.headers.get("inference-header-content-length"))
        outputs, engine, headers = await _run(context, name, request, asked.inputs, asked.outputs)
        return _respond(asked, outputs, name, engine, headers)

    @routes.post("/v1/classify")
    async def classify(model: str, request: Request) -> JSONResponse:
        engine = _find(context, model, None)
        vision = engine.manifest.vision
        if vision is None:
            raise InvalidInputError(f"model {model!r} is no image classifier", remedy="use /v2/models/NAME/infer")
        data = await _body(request)
        image = await asyncio.to_thread(prepare_image, data, vision)
        first = cast(TensorRuntime, engine.runtime).inputs[0].name
        outputs, engine, headers = await _run(context, model, request, {first: image}, [])
        scores = _softmax(next(iter(outputs.values()))[0].astype(np.float64).reshape(-1))
        best = np.argsort(-scores)[:TOP]
        labels = [{"label": _label(vision, int(at)), "index": int(at), "score": float(scores[at])} for at in best]
        body = {"model": model, "version": engine.slot.version, "labels": labels}
        return JSONResponse(body, headers=headers)

    return routes


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


async def _run(
    context: Context, name: str, request: Request, inputs: dict[str, Array], outputs: list[str]
) -> tuple[dict[str, Array], Engine, dict[str, str]]:
    decision = context.decide({**request.headers, "x-foreshore-privacy": "local-only"}, name, 0, 0)
    begun = time.monotonic()
    async with context.agent.engines.use(name) as engine:
        try:
            result = await asyncio.to_thread(cast(TensorRuntime, engine.runtime).infer, inputs, outputs)
        except InvalidInputError:
            raise
        except Exception as error:
            engine.num_errors += 1
            context.metrics.requests.labels("device", "error").inc()
            raise UnavailableError(f"the model failed: {error}", remedy="check the inputs, then try again") from error
    seconds = time.monotonic() - begun
    context.metrics.requests.labels("device", "ok").inc()
    context.metrics.seconds.labels("device").observe(seconds)
    context.finish(decision, {"total_s": seconds})
    return result, engine, context.answer_headers(decision, "device", engine)


def _find(context: Context, name: str, version: str | None) -> Engine:
    engine = context.agent.engines.find(name)
    if engine is None or engine.manifest.kind != "tensor":
        raise NotFoundError(f"tensor model {name!r} is not on this device", remedy="see GET /v1/models")
    if version is not None and version != engine.slot.version:
        raise NotFoundError(f"version {version!r} of {name!r} does not run", remedy=f"{engine.slot.version} does")
    return engine


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise TooLargeError(f"the body has more than {MAX_BODY_BYTES} bytes", remedy="send fewer at once")
        parts.append(part)
    return b"".join(parts)


def _parse(data: bytes, header_length: str | None) -> _Asked:
    try:
        split = int(header_length) if header_length is not None else len(data)
        document = json.loads(data[:split])
        inputs, offset = {}, split
        for entry in document["inputs"]:
            size = entry.get("parameters", {}).get("binary_data_size")
            inputs[str(entry["name"])] = _tensor(entry, data[offset : offset + size] if size is not None else None)
            offset += size or 0
        wanted = document.get("outputs") or []
        return _Asked(
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


def _respond(asked: _Asked, outputs: dict[str, Array], name: str, engine: Engine, headers: dict[str, str]) -> Response:
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


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return cast(Array, powers / powers.sum())


def _label(vision: Vision, index: int) -> str:
    return vision.labels[index] if index < len(vision.labels) else str(index)
