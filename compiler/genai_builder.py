"""Runs onnxruntime-genai's model builder in this process: `python -m compiler.genai_builder ARGUMENTS`.

A process of its own because the builder holds several gigabytes, prints without restraint and may crash. It ends with
its parent.
"""

from __future__ import annotations

import runpy
import signal
import sys

from wire.process import die_with_parent

if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    sys.argv[0] = "onnxruntime_genai.models.builder"
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
