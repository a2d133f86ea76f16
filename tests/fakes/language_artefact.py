"""SmolLM2-135M-Instruct as an onnxruntime-genai artefact, built once from the real weights and kept in the cache."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / ".cache" / "models"
SOURCE = MODELS / "smollm2-135m-instruct"
CONTEXT_TOKENS = 2048


def built_language_model() -> Path:
    """The artefact's folder; the first call takes half a minute of a core."""
    from compiler.language_model import build_genai

    target = MODELS / "built" / "smollm2-135m-instruct-int4"
    if not (target / "genai_config.json").exists():
        target.parent.mkdir(exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            build_genai(SOURCE, staging / "model", "int4", "cpu", {"algo_config": "k_quant_mixed"})
            _limit_context(staging / "model" / "genai_config.json")
            os.rename(staging / "model", target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _limit_context(path: Path) -> None:
    config = json.loads(path.read_text())
    config["model"]["context_length"] = config["search"]["max_length"] = CONTEXT_TOKENS
    path.write_text(json.dumps(config))
