"""A builder machine: builds engines for the hardware keys it can serve, from the artefacts that such devices run.

TensorRT-RTX builds for other compute capabilities and needs no GPU, so this may be any machine with the package;
classic TensorRT builds where the device is. The artefact comes by digest; the build runs in a process of its own,
because a builder may crash, and is ended with it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from compiler.targets import EngineTarget
from compiler.tensorrt import Builder, EngineBuildError, NoBuilder, build_engine, find_builder
from model_registry.client import ControlClient, EngineLease
from model_registry.compatibility.hardware_key import HardwareKey, parse_key
from model_registry.engine_builder import EngineBuilder, Outcome
from model_registry.manifest import Manifest
from wire.errors import UnsupportedModelError
from wire.tether import tethered

LOOK_S = 0.1
MAX_SAID_CHARS = 1000
POLL_S = 10.0


def keys_of(name: str, capabilities: Sequence[str], architectures: Sequence[str]) -> list[str]:
    """The hardware keys that the builder `name` of this machine serves; `UnsupportedModelError` when it cannot work."""
    builder = find_builder(name)
    if isinstance(builder, NoBuilder):
        raise UnsupportedModelError(builder.reason, remedy="run the builder where it can work")
    return [
        str(HardwareKey(builder.name, builder.version, capability, architecture))
        for capability in capabilities
        for architecture in architectures
    ]


def build_agent(control: ControlClient, folder: Path, keys: Sequence[str]) -> EngineBuilder:
    """A builder of engines for `keys`."""

    def build(lease: EngineLease, engine: Path, going_on: Callable[[], None]) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            graph = fetch_artefact(control, control.get_manifest(lease.manifest), Path(place), going_on)
            _build_apart(lease.hardware_key, graph, engine, going_on)

    folder.mkdir(parents=True, exist_ok=True)
    return EngineBuilder(control, build, folder, keys=keys)


def work(builder: EngineBuilder, told: Callable[[Outcome], None], *, once: bool) -> None:
    """Work off leases until ended, or until there is none."""
    while True:
        outcome = builder.work_once()
        if outcome is not None:
            told(outcome)
        elif once:
            return
        else:
            time.sleep(POLL_S)


def fetch_artefact(control: ControlClient, manifest: Manifest, folder: Path, going_on: Callable[[], None]) -> Path:
    """Write the artefact's files, each chunk verified; the path of its graph."""
    for file in manifest.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            for chunk in file.chunks:
                going_on()
                target.write(control.get_chunk(chunk.digest))
    return folder / manifest.entry


def _build_apart(key: str, graph: Path, engine: Path, going_on: Callable[[], None]) -> None:
    command = [sys.executable, "-m", "compiler.engine_builder", key, str(graph), str(engine)]
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(tethered(command, signal.SIGKILL), stdout=output, stderr=subprocess.STDOUT) as run,
    ):
        try:
            while run.poll() is None:
                going_on()
                time.sleep(LOOK_S)
        finally:
            run.kill()
            run.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")[-MAX_SAID_CHARS:]
    if run.returncode != 0 or not engine.is_file():
        raise EngineBuildError(f"the builder ended with {run.returncode}: {said}", remedy="see its output")


def main(arguments: Sequence[str]) -> None:
    """The build itself: KEY GRAPH ENGINE."""
    key, graph, engine = parse_key(arguments[0]), Path(arguments[1]), Path(arguments[2])
    if key is None:
        sys.exit(f"{arguments[0]} is no hardware key")
    builder = find_builder(key.builder)
    if not isinstance(builder, Builder) or builder.version != key.version:
        sys.exit(f"{key.builder} {key.version} is not here")
    target = EngineTarget.model_validate({"builder": key.builder, "compute_capabilities": [key.compute_capability]})
    build_engine(builder, target, graph, engine)


if __name__ == "__main__":
    main(sys.argv[1:])
