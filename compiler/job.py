"""One compile job in a process of its own: `python -m compiler.job REQUEST.json`.

The request names local files only; the process has no network business and no credentials. It speaks JSON lines on
its standard output: `{"stage", "progress", "message"}` while it works, at the end `{"manifest", "stages"}` or
`{"error": {...}}`. Everything else that libraries print goes to standard error, the job's log. It ends with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from wire.errors import ForeshoreError
from wire.process import die_with_parent


def run(request: dict[str, Any], say: Any) -> None:
    """Compile what `request` describes and `say` how it goes; every failure is said, none is raised."""
    from compiler.cache import BuildCache  # heavy imports after the parent's death is noticed
    from compiler.compile_job import CompileJob
    from compiler.pipeline import compile_model
    from compiler.recipe import parse_recipe
    from compiler.targets import parse_target
    from model_registry.manifest import Vision

    try:
        job = CompileJob(
            name=request["name"],
            kind=request["model_kind"],
            target=parse_target(request["target"]),
            recipe=parse_recipe(request["recipe"]),
            source_format=request["source_format"],
            source=Path(request["source"]),
            source_digest=request["source_digest"],
            golden=Path(request["golden"]) if request["golden"] else None,
            vision=Vision.model_validate(request["vision"]) if request["vision"] else None,
        )
        cache = BuildCache(Path(request["cache"]))
        built = compile_model(
            job,
            Path(request["out"]),
            cache,
            lambda stage, progress, message: say({"stage": stage, "progress": progress, "message": message}),
        )
        path = Path(request["out"]).with_suffix(".manifest.json")
        path.write_bytes(built.manifest.to_bytes())
        say({"manifest": str(path), "stages": [stage.to_dict() for stage in built.stages]})
    except ForeshoreError as error:
        say({"error": error.to_dict()})
    except Exception as error:  # noqa: BLE001 - top of the process: the job fails visibly with its log
        import traceback

        traceback.print_exc()
        say({"error": {"code": "internal_error", "message": f"{type(error).__name__}: {error}"[:1000], "remedy": ""}})


def main() -> int:
    """Entry point; the request's path is the only argument."""
    die_with_parent(signal.SIGKILL)
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs to the log
    run(json.loads(Path(sys.argv[1]).read_text()), lambda document: lines.write(json.dumps(document) + "\n"))
    lines.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
