"""SmolLM2-135M-Instruct as an onnxruntime-genai artefact, built once from the real weights and kept in the cache."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compiler.language_model import Held

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


def held_answers(num_tokens: int) -> Held:
    """What the source says of held text and prompts: a cached stage beside the artefact, as a compile job has it."""
    from compiler.cache import BuildCache
    from compiler.language_model import Held
    from compiler.language_stages import source_logits
    from compiler.progress import Progress, StageTimes
    from compiler.prompt_set import Answers
    from compiler.source_memo import SourceMemo
    from compiler.workshop import Workshop
    from model_registry.sources import recognise

    root = MODELS / "built" / "stages"
    root.mkdir(parents=True, exist_ok=True)
    shop = Workshop(BuildCache(root), Progress([], StageTimes(root / "times.json"), 1, lambda *event: None))
    name = SourceMemo(root / "sources.json").hash_source(recognise(SOURCE)).digest
    built = source_logits(shop, SOURCE, name, num_tokens)
    return Held(
        np.load(built.path("tokens.npy")), np.load(built.path("logits.npy")), Answers.load(built.path("answers.json"))
    )


def _limit_context(path: Path) -> None:
    config = json.loads(path.read_text())
    config["model"]["context_length"] = config["search"]["max_length"] = CONTEXT_TOKENS
    path.write_text(json.dumps(config))
