"""onnxruntime-genai's model builder, for a process of its own (`compiler.tools.run_tool`).

It holds several gigabytes, prints without restraint, reads its arguments from the command line and may crash.
"""

from __future__ import annotations

import runpy
import sys

_BUILDER = "onnxruntime_genai.models.builder"


def build(arguments: list[str]) -> None:
    """Run the builder with the command line `arguments`."""
    sys.argv = [_BUILDER, *arguments]
    runpy.run_module(_BUILDER, run_name="__main__")
