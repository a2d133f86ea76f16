"""The tools that write artefacts: their versions, which are part of every build key, and running them in a process.

A tool that is heavy or may crash runs in a process of its own; its crash is an error that names the signal and ends
with what the tool said, never the end of this process. The child dies with its parent, and its whole group is ended
when the wait ends for any reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from wire.errors import ForeshoreError, TimedOutError

ROOT = Path(__file__).resolve().parent.parent
TOOL_TIMEOUT_S = 1800.0
_TAIL_BYTES = 1500


class ToolCrashedError(ForeshoreError):
    """A tool's process ended by a signal or without an answer."""

    code = "tool_crashed"


class ToolError(ForeshoreError):
    """A tool said that it failed; `code` is the one it gave."""

    code = "tool_failed"


@functools.cache
def version_of(distribution: str) -> str:
    """The installed version, or "absent"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def versions_of(distributions: Sequence[str]) -> dict[str, str]:
    """Versions by name."""
    return {name: version_of(name) for name in distributions}


def run_tool(
    function: str,
    arguments: Mapping[str, Any],
    *,
    log: Path | None = None,
    python: str = sys.executable,
    timeout_s: float = TOOL_TIMEOUT_S,
) -> Any:
    """Call `module:function` with plain `arguments` in a process of its own; return its plain result.

    What it prints goes to `log` (else to this process's standard error). A `ForeshoreError` that it raises comes back
    as `ToolError` with the same code and words.
    """
    with tempfile.TemporaryDirectory(prefix="tool-") as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps({"function": function, "arguments": dict(arguments)}))
        own_log = log or Path(folder, "tool.log")
        status = _run([python, "-m", "compiler.tools", str(request), str(answer)], own_log, timeout_s, function)
        tail = own_log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
        if status != 0 or not answer.exists():
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise ToolCrashedError(f"{function} ended with {how}: {tail[-800:]}", remedy="see the job's log")
        result = json.loads(answer.read_bytes())
    if log is None and tail:
        sys.stderr.write(tail + "\n")
    if "error" in result:
        raise _tool_error(result["error"])
    return result["result"]


def _run(command: list[str], log: Path, timeout_s: float, function: str) -> int:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT
        )
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TimedOutError(f"{function} ran over {timeout_s:.0f} s", remedy="use a smaller model") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(timeout=30)


def _tool_error(error: Mapping[str, Any]) -> ToolError:
    made = ToolError(error["message"], remedy=error["remedy"], **error["details"])
    made.code = error["code"]  # type: ignore[misc]
    return made


def _main(request: Path, answer: Path) -> int:
    from wire.process import die_with_parent

    die_with_parent(signal.SIGKILL)
    document = json.loads(request.read_bytes())
    module, _, name = document["function"].partition(":")
    try:
        result = {"result": getattr(importlib.import_module(module), name)(**document["arguments"])}
    except ForeshoreError as error:
        result = {"error": error.to_dict()}
    answer.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
