"""Photographs that packages ship, cut into calibration and held-out crops for image classifiers.

The two sets share no photograph, so a gate never sees what the quantiser was tuned on. Crops are drawn with a fixed
seed: the same call gives the same bytes on every machine, which the build cache relies on.
"""

from __future__ import annotations

import hashlib
import zlib
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from PIL import Image

from model_registry.manifest import Vision
from wire.errors import MissingExtraError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET = Vision(resize_pixels=256, crop_pixels=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)

_SKIMAGE = ("skimage", "data", "scikit-image")
_SKLEARN = ("sklearn.datasets", "images", "scikit-learn")
_CALIBRATION = (
    ("astronaut.png", _SKIMAGE),
    ("brick.png", _SKIMAGE),
    ("cell.png", _SKIMAGE),
    ("coins.png", _SKIMAGE),
    ("color.png", _SKIMAGE),
    ("flower.jpg", _SKLEARN),
    ("grass.png", _SKIMAGE),
    ("hubble_deep_field.jpg", _SKIMAGE),
    ("ihc.png", _SKIMAGE),
    ("motorcycle_left.png", _SKIMAGE),
    ("page.png", _SKIMAGE),
    ("retina.jpg", _SKIMAGE),
)
_HELD_OUT = (
    ("camera.png", _SKIMAGE),
    ("chelsea.png", _SKIMAGE),
    ("china.jpg", _SKLEARN),
    ("coffee.png", _SKIMAGE),
    ("horse.png", _SKIMAGE),
    ("rocket.jpg", _SKIMAGE),
)

Split = Literal["calibration", "held-out"]
Array = np.ndarray[Any, Any]


def load_photographs(split: Split) -> list[Image.Image]:
    """The photographs of `split` in a fixed order, as RGB. Raises `MissingExtraError` where a package is absent."""
    return [_open(name, *place) for name, place in (_CALIBRATION if split == "calibration" else _HELD_OUT)]


def whole_images(split: Split, vision: Vision = IMAGENET) -> Array:
    """Each photograph as an application would send it: [num_photographs, 3, crop, crop] float32."""
    return np.stack([preprocess(image, vision) for image in load_photographs(split)])


def augmented_crops(split: Split, num_crops: int, vision: Vision = IMAGENET) -> Array:
    """`num_crops` random crops, mirrored and re-lit, photographs in turn: [num_crops, 3, crop, crop] float32."""
    images = load_photographs(split)
    random = np.random.default_rng(zlib.crc32(split.encode()))
    return np.stack([_augment(images[index % len(images)], vision, random) for index in range(num_crops)])


def preprocess(image: Image.Image, vision: Vision) -> Array:
    """Resize the short side, cut the centre, normalise: [3, crop, crop] float32."""
    scale = vision.resize_pixels / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (resized.width - vision.crop_pixels) // 2, (resized.height - vision.crop_pixels) // 2
    return _normalise(resized.crop((left, top, left + vision.crop_pixels, top + vision.crop_pixels)), vision)


def digest_of(array: Array) -> str:
    """SHA-256 of shape, type and values: names a calibration set in the build key."""
    head = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _augment(image: Image.Image, vision: Vision, random: np.random.Generator) -> Array:
    side = int(min(image.size) * random.uniform(0.5, 1.0))
    left = int(random.integers(0, image.width - side + 1))
    top = int(random.integers(0, image.height - side + 1))
    box = (left, top, left + side, top + side)
    crop = image.resize((vision.crop_pixels, vision.crop_pixels), Image.Resampling.BILINEAR, box=box)
    if random.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _normalise(crop.point(_gain_table(random.uniform(0.7, 1.2))), vision)


def _gain_table(gain: float) -> list[int]:
    return [min(255, round(value * gain)) for value in range(256)] * 3


def _normalise(image: Image.Image, vision: Vision) -> Array:
    pixels = np.asarray(image, dtype=np.float32) / 255.0
    normalised = (pixels - np.asarray(vision.mean, np.float32)) / np.asarray(vision.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1).astype(np.float32))


def _open(name: str, package: str, folder: str, distribution: str) -> Image.Image:
    try:
        place = files(package).joinpath(folder, name)
        with place.open("rb") as file:
            return Image.open(file).convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise MissingExtraError(distribution, "compiler") from error
