"""A trial of a model in a process of its own, before the agent loads it.

A model that ends its process, hangs or takes more memory than there is does so there; the agent goes on serving the old
one and learns what happened. `python -m edge_agent.trial PARENT` reads one JSON object from standard input, loads the
artefact, runs one golden case and writes two: what it held before it loaded anything, then the memory that the model
took, or the error. What it held before, imports of ours, is not counted against the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.config import Profile
from edge_agent.engines import check_memory
from edge_agent.thrift import give_back
from model_registry.manifest import Manifest, parse_manifest
from wire.errors import ForeshoreError, TimedOutError

if TYPE_CHECKING:
    from edge_agent.runtimes.base import TensorRuntime

NICENESS = 5
WATCH_S = 0.05
MAX_OUTPUT_BYTES = 64 * 1024


class CrashedError(ForeshoreError):
    """The model ended the process that loaded it."""

    code = "crashed"


class TrialFailedError(ForeshoreError):
    """The trial ended with the error of another process; `code` is that of the error."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code  # type: ignore[misc]


async def try_out(
    manifest: Path, files: Path, profile: Profile, *, free_bytes: int, timeout_s: float, engine: Path | None = None
) -> int:
    """Bytes of memory that the model holds once it runs; never, not even while it loaded, were they above `free_bytes`.
    With `engine`, that is opened instead of the graph, and all golden cases must hold.

    Raises `CrashedError`, `InsufficientSpaceError`, `TimedOutError` or what loading it raised (`TrialFailedError`).
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "edge_agent.trial",
        str(os.getpid()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=MAX_OUTPUT_BYTES,
    )
    asked = {"manifest": str(manifest), "files": str(files), "profile": profile.model_dump(mode="json")}
    asked |= {"engine": str(engine)} if engine is not None else {}
    held_bytes, output = 0, b""
    try:
        async with asyncio.timeout(timeout_s):
            first = await _ask(process, asked)
            watch = _watch(process, _began_with(first), free_bytes)
            watching = asyncio.create_task(watch, name=f"watch-trial-{process.pid}")
            try:
                output = first + (await process.communicate())[0]
            finally:
                watching.cancel()
                held_bytes = await _seen(watching)
    except TimeoutError as error:
        raise TimedOutError(f"loading took more than {timeout_s:g} s", remedy="mend the model") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return _read(output, process.returncode or 0, held_bytes, free_bytes)


async def _ask(process: asyncio.subprocess.Process, asked: dict[str, Any]) -> bytes:
    """Say what to try; returns the first line of the answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):  # it ended at once: the missing answer tells
        process.stdin.write(json.dumps(asked).encode())
        await process.stdin.drain()
        process.stdin.close()
    return await process.stdout.readline()


def _began_with(line: bytes) -> int:
    """Bytes that the trial held before it loaded anything."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["began_with_bytes"])
    return 0


async def _watch(process: asyncio.subprocess.Process, began_with_bytes: int, max_bytes: int) -> int:
    """End the trial when it takes more than `max_bytes` beside what it began with; returns what it took."""
    while True:
        held = resident_bytes(process.pid) - began_with_bytes
        if held > max_bytes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            return held
        await asyncio.sleep(WATCH_S)


async def _seen(watching: asyncio.Task[int]) -> int:
    """What a watch that had to end its trial saw, else 0."""
    try:
        return await watching
    except asyncio.CancelledError:
        return 0


def _read(output: bytes, status: int, held_bytes: int, free_bytes: int) -> int:
    if held_bytes:
        check_memory(held_bytes, free_bytes)
    lines = [line for line in output.splitlines() if line.startswith(b"{")]
    said: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if status < 0 or not {"code", "memory_bytes"} & said.keys():
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        raise CrashedError(f"the model ended the process that loaded it with {how}", remedy="mend the model")
    if "code" in said:
        raise TrialFailedError(str(said["code"]), str(said["sentence"]))
    check_memory(int(said["peak_bytes"]), free_bytes)
    return int(said["memory_bytes"])


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    """Memory of a process (`VmHWM`: its peak); 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def main() -> None:
    """The trial itself."""
    from wire.process import die_with_parent

    die_with_parent(signal.SIGKILL, parent=int(sys.argv[1]))
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = json.load(sys.stdin)
    try:
        said: dict[str, Any] = _measure(asked)
    except ForeshoreError as error:
        said = {"code": error.code, "sentence": str(error)}
    except Exception as error:  # noqa: BLE001 - top of the process: the agent reports it as the result
        said = {"code": "load_failed", "sentence": f"{type(error).__name__}: {error}"}
    print(json.dumps(said), flush=True)  # noqa: T201 - the answer


def _measure(asked: dict[str, Any]) -> dict[str, int]:
    """What it took, at its peak and now; tells first what was there before."""
    from edge_agent.probe import run_once
    from edge_agent.runtimes.base import import_runtime, load

    manifest: Manifest = parse_manifest(Path(asked["manifest"]).read_bytes())
    profile = Profile.model_validate(asked["profile"])
    files = Path(asked["files"])
    import_runtime(manifest)
    before = resident_bytes(os.getpid())
    print(json.dumps({"began_with_bytes": before}), flush=True)  # noqa: T201 - the parent waits for it
    if "engine" in asked:
        runtime: object = _try_engine(manifest, files, profile, Path(asked["engine"]))
        return _taken(before)
    runtime = load(manifest, files, profile)
    with contextlib.suppress(Exception):  # the probe judges answers; here it counts whether the process survives
        run_once(manifest, files, runtime)
    return _taken(before)


def _taken(before: int) -> dict[str, int]:
    """While the model is still there."""
    peak = resident_bytes(os.getpid(), "VmHWM")
    give_back()
    held = {"memory_bytes": resident_bytes(os.getpid()), "peak_bytes": peak}
    return {name: max(0, value - before) for name, value in held.items()}


def _try_engine(manifest: Manifest, files: Path, profile: Profile, engine: Path) -> TensorRuntime:
    from edge_agent.engine_runtime import open_engine
    from edge_agent.probe import probe

    assert profile.engine is not None, "only a device with an engine runtime tries engines"
    runtime = open_engine(profile.engine, engine)
    probe(manifest, files, runtime, old=None, max_slowdown=profile.max_slowdown)
    return runtime


if __name__ == "__main__":
    main()
