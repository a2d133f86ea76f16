"""From a source model to a verified artefact for one target: which stages, in which order, judged by which gates.

import -> clean or build -> quantise -> measure -> golden -> engine -> package. Every stage is cached by what decides
it (`compiler.cache`), so targets share what they agree on and a job that was killed loses the stage it was in. Nothing
heavy is imported unless a stage has to be built. Limits are applied to cached figures; the result is a folder and its
manifest. Nothing is uploaded or signed here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compiler.cache import BuildCache
from compiler.compile_job import BuiltModel, CompileJob, Tried, size_bytes
from compiler.engine_stage import ENGINE_FILE, EngineResult, add_engine
from compiler.language_build import build_language_model
from compiler.modelopt import find_modelopt
from compiler.package import Part, package
from compiler.progress import Progress, Report, StageTimes
from compiler.recipe import Recipe
from compiler.runtime_choice import choose_for_tensors
from compiler.tensor_build import build_tensor_model
from compiler.workshop import StageReport, Workshop, reproducibility_of
from model_registry.manifest import Manifest, Requirements
from model_registry.sources import KIND_BY_FORMAT
from wire.errors import InvalidInputError

TIMES_FILE = "times.json"
_TENSOR_PLAN = ("fingerprint", "clean", "inputs", "answers")
_LANGUAGE_PLAN = ("fingerprint", "genai", "source-logits", "measure", "golden", "speeds", "package")


@dataclass(frozen=True)
class Artefact:
    """A finished artefact: the manifest describes exactly the files in `folder`. `stages`, `tried`: how it came."""

    folder: Path
    manifest: Manifest
    stages: tuple[StageReport, ...] = ()
    notes: tuple[str, ...] = ()
    tried: tuple[Tried, ...] = ()


def compile_model(
    job: CompileJob, out: Path, cache: BuildCache, report: Report, environment: Mapping[str, str] = os.environ
) -> Artefact:
    """Compile `job` into the folder `out` (new). Raises `GateFailedError` or another `ForeshoreError`."""
    recipe = job.recipe.filled(job.target)
    if KIND_BY_FORMAT[job.source_format] != job.kind:
        raise InvalidInputError(f"a {job.source_format} source is not a {job.kind} model", remedy="give the right kind")
    progress = Progress(_plan(job, recipe), StageTimes(cache.root / TIMES_FILE), size_bytes(job.source), report)
    shop = Workshop(cache, progress)
    if job.kind == "tensor":
        model = build_tensor_model(job, recipe, shop, find_modelopt(environment))
    else:
        model = build_language_model(job, recipe, shop, report)
    return _finish(job, recipe, model, out, shop)


def _plan(job: CompileJob, recipe: Recipe) -> list[str]:
    first = ["import"] if job.source_format in ("gguf", "pt2") else []
    if job.kind == "language":
        return [*first, *_LANGUAGE_PLAN]
    by_precision = {"fp32": [], "fp16": ["cast"], "int8": ["inputs", "calibrate", "quantise"], "fp8": ["quantise"]}
    return [
        *first,
        *_TENSOR_PLAN,
        *by_precision[recipe.tensor.precision or "fp32"],
        *("measure", "inputs", "answers", "golden"),
        *(["engine"] if job.target.engine else []),
        "package",
    ]


def _finish(job: CompileJob, recipe: Recipe, model: BuiltModel, out: Path, shop: Workshop) -> Artefact:
    parts, notes = list(model.parts), list(model.notes)
    engine = None
    if job.target.engine is not None:
        if job.kind == "tensor" and recipe.tensor.runtime == "onnxruntime":
            engine = EngineResult(reason="the recipe names onnxruntime")
        else:
            engine = add_engine(shop, job.kind, job.target.engine, model.graph)
        if engine.built is not None:
            parts.append(Part(ENGINE_FILE, engine.built.path(ENGINE_FILE), engine.built.digest))
        else:
            notes.append(f"portable ONNX only: {engine.reason}")
    document = recipe.model_dump(mode="json") | {"target": job.target.model_dump(mode="json"), "notes": notes}
    if engine is not None and engine.built is None:
        document["engine_not_built"] = engine.reason
    manifest = package(
        shop,
        parts,
        document,
        out,
        name=job.name,
        kind=job.kind,
        target=job.target.name,
        runtime=model.runtime,
        runtime_choice=model.runtime_choice or choose_for_tensors(job, engine),
        precision=model.precision,
        entry=model.entry,
        requires=Requirements(
            memory_bytes=model.memory_bytes,
            architectures=job.target.architectures,
            cpu_features=job.target.cpu_features,
        ),
        context_tokens=model.context_tokens,
        engine=engine.description if engine is not None else None,
        golden=model.golden,
        vision=model.vision,
        gates=model.gates,
        recipe_digest=recipe.digest,
        source_digest=job.source_digest,
        reproducibility=reproducibility_of(shop.reports),
    )
    shop.progress.finish(f"{manifest.size_bytes / 1e6:.1f} MB in {len(manifest.chunk_list())} chunks")
    return Artefact(out, manifest, tuple(shop.reports), tuple(notes), model.tried)
