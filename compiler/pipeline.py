"""From a source model to a verified artefact for one target: which stages, in which order, judged by which gates.

import -> clean or build -> quantise -> measure -> golden -> engine -> package. Every stage is cached by what decides
it (`compiler.cache`), so targets share what they agree on and a job that was killed loses the stage it was in. Nothing
heavy is imported unless a stage has to be built. Limits are applied to cached figures; the result is a folder and its
manifest. Nothing is uploaded or signed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler import language_stages, tensor_stages
from compiler.cache import BuildCache, Built, Stage
from compiler.engine_stage import ENGINE_FILE, add_engine
from compiler.fingerprint import fingerprint_source
from compiler.gates import budget_gates, gate, language_gates, require_all, tensor_gates
from compiler.latency import measure_latency_ms
from compiler.modelopt import ModelOpt, find_modelopt
from compiler.options import builder_options, language_notes, tensor_notes
from compiler.package import Part, package
from compiler.processor import tensor_kernels
from compiler.progress import Progress, Report, StageTimes
from compiler.recipe import LanguageRecipe, Recipe
from compiler.targets import Target
from compiler.tensor_model import Signature, fit_vision
from compiler.tensor_stages import TensorSource
from compiler.workshop import StageReport, Workshop
from model_registry.manifest import GateResult, Golden, Kind, Manifest, Requirements, Vision
from wire.errors import InvalidInputError, MissingExtraError

TIMES_FILE = "times.json"
RUNTIME_OVERHEAD_BYTES = 96 << 20
MIN_INTEGER_LAYER_SHARE = 0.6
_TENSOR_PLAN = ("fingerprint", "clean", "inputs", "answers")
_LANGUAGE_PLAN = ("fingerprint", "genai", "source-logits", "measure", "golden", "package")


@dataclass(frozen=True)
class CompileJob:
    """What to compile: `source` is an ONNX or GGUF file or a Hugging Face style folder.

    `data` (.npz, one array per input) are typical inputs of a tensor model, for calibration and gates.
    """

    name: str
    kind: Kind
    target: Target
    recipe: Recipe
    source_format: str
    source: Path
    source_digest: str
    golden: Path | None = None
    vision: Vision | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Artefact:
    """A finished artefact: the manifest describes exactly the files in `folder`. `stages` is how it came about."""

    folder: Path
    manifest: Manifest
    stages: tuple[StageReport, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Model:
    """A built and judged model before packaging; `notes` say what a reader of the recipe would not expect."""

    parts: list[Part]
    graph: Built
    runtime: str
    precision: str
    entry: str
    gates: list[GateResult]
    golden: Golden
    vision: Vision | None
    context_tokens: int
    memory_bytes: int
    notes: tuple[str, ...]


def compile_model(
    job: CompileJob, out: Path, cache: BuildCache, report: Report, environment: Mapping[str, str] = os.environ
) -> Artefact:
    """Compile `job` into the folder `out` (new). Raises `GateFailedError` or another `ForeshoreError`."""
    recipe = job.recipe.filled(job.target)
    is_tensor = job.source_format == "onnx"
    if is_tensor != (job.kind == "tensor"):
        raise InvalidInputError(f"a {job.source_format} source is not a {job.kind} model", remedy="give the right kind")
    progress = Progress(_plan(job, recipe), StageTimes(cache.root / TIMES_FILE), _size_bytes(job.source), report)
    shop = Workshop(cache, progress)
    if is_tensor:
        model = _compile_tensor(job, recipe, shop, find_modelopt(environment))
    else:
        model = _compile_language(job, recipe, shop, report)
    return _finish(job, recipe, model, out, shop)


def _plan(job: CompileJob, recipe: Recipe) -> list[str]:
    if job.source_format != "onnx":
        return [*(["import"] if job.source_format == "gguf" else []), *_LANGUAGE_PLAN]
    by_precision = {"fp32": [], "fp16": ["cast"], "int8": ["inputs", "calibrate", "quantise"], "fp8": ["quantise"]}
    return [
        *_TENSOR_PLAN,
        *by_precision[recipe.tensor.precision or "fp32"],
        *("measure", "inputs", "answers", "golden"),
        *(["engine"] if job.target.engine else []),
        "package",
    ]


def _finish(job: CompileJob, recipe: Recipe, model: _Model, out: Path, shop: Workshop) -> Artefact:
    parts, notes = list(model.parts), list(model.notes)
    engine = None
    if job.target.engine is not None:
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
    )
    shop.progress.finish(f"{manifest.size_bytes / 1e6:.1f} MB in {len(manifest.chunk_list())} chunks")
    return Artefact(out, manifest, tuple(shop.reports), tuple(notes))


def _fingerprint(job: CompileJob, path: Path, shop: Workshop, digest: str) -> str:
    """The model's name in keys. It is a function of the source's bytes, so those name the stage."""
    source_format = "onnx" if job.source_format == "onnx" else "huggingface"

    def build(to: Path) -> None:
        import json

        (to / "fingerprint.json").write_text(json.dumps(fingerprint_source(source_format, path).to_dict()))

    tools = ("onnx",) if source_format == "onnx" else ()
    stage = Stage("fingerprint", {"source": digest, "format": source_format}, tools, build)
    return str(shop.run(stage, "reading the model").read_json("fingerprint.json")["digest"])


# tensor models


def _compile_tensor(job: CompileJob, recipe: Recipe, shop: Workshop, modelopt: ModelOpt | str) -> _Model:
    from compiler.photographs import IMAGENET

    fingerprint = _fingerprint(job, job.source, shop, job.source_digest)
    cleaned = tensor_stages.clean(shop, job.source, fingerprint)
    signature = Signature.from_dict(cleaned.read_json("signature.json"))
    source = TensorSource(
        job.source, fingerprint, cleaned, signature, fit_vision(signature, job.vision, IMAGENET), job.data
    )
    given = tensor_stages.inputs(shop, source, "held-out", recipe.tensor.gate_crops if source.is_image_model else 8)
    expected = tensor_stages.answers(shop, source, given)
    built = _Candidates(job, recipe, shop, source, modelopt)
    gates: list[GateResult] = []
    graph = cleaned
    for graph in built.candidates():
        figures = tensor_stages.measure(
            shop, graph, given, expected, job.target.tensor_kernels, is_8_bit=built.precision == "int8"
        )
        gates = _judge_tensor(figures, graph, recipe, _size_bytes(job.source))
        shop.progress.say("measure", "; ".join(f"{r.name} {r.value:g} ({r.sense} {r.limit:g})" for r in gates))
        if all(result.passed for result in gates):
            break
    size = graph.path(tensor_stages.MODEL).stat().st_size
    memory = 3 * size + RUNTIME_OVERHEAD_BYTES
    gates += _judge_budget(job.target, memory, graph, given)
    require_all(gates)
    golden = tensor_stages.golden(shop, source, job.golden)
    return _Model(
        parts=[
            Part("model.onnx", graph.path(tensor_stages.MODEL), graph.files[tensor_stages.MODEL]),
            Part("golden.npz", golden.path(tensor_stages.GOLDEN), golden.files[tensor_stages.GOLDEN]),
        ],
        graph=graph,
        runtime="onnxruntime",
        precision=built.precision,
        entry="model.onnx",
        gates=gates,
        golden=Golden(
            path="golden.npz",
            num_cases=golden.read_json("cases.json"),
            min_cosine=recipe.tensor.golden_min_cosine,
            min_top1_agreement=recipe.tensor.golden_min_top1_agreement if source.vision is not None else None,
        ),
        vision=source.vision,
        context_tokens=0,
        memory_bytes=memory,
        notes=(*built.notes, *tensor_notes(job.recipe, built.precision)),
    )


class _Candidates:
    """The graphs to try for one target, best first; the first whose gates hold is taken."""

    def __init__(
        self, job: CompileJob, recipe: Recipe, shop: Workshop, source: TensorSource, modelopt: ModelOpt | str
    ) -> None:
        self.precision: str = recipe.tensor.precision or "fp32"
        self.notes: list[str] = []
        self._job, self._recipe, self._shop, self._source, self._modelopt = job, recipe, shop, source, modelopt
        if self.precision in ("int8", "fp8") and not source.can_calibrate:
            self.notes.append("not an image model and no data given: nothing to calibrate with, numbers stay float")
            self.precision = "fp32"

    def candidates(self) -> Iterator[Built]:
        """Graphs, built when they are asked for."""
        if self.precision == "fp32":
            yield self._source.cleaned
        elif self.precision == "fp16":
            yield tensor_stages.cast(self._shop, self._source.cleaned)
        else:
            yield from self._eight_bits()

    def _eight_bits(self) -> Iterator[Built]:
        recipe, shop, source = self._recipe.tensor, self._shop, self._source
        samples = tensor_stages.inputs(shop, source, "calibration", recipe.calibration_crops)
        if self.precision == "fp8" or recipe.quantiser == "modelopt":
            if isinstance(self._modelopt, ModelOpt):
                yield tensor_stages.quantise_by_modelopt(shop, source.cleaned, samples, self.precision, self._modelopt)
                return
            if self.precision == "fp8":
                raise MissingExtraError("nvidia-modelopt", "compiler")
            self.notes.append(f"quantised by ONNX Runtime, not ModelOpt: {self._modelopt}")
        calibrated = tensor_stages.calibrate(shop, source.cleaned, samples)
        for rung in recipe.float_rungs:
            yield tensor_stages.quantise(shop, calibrated, self._job.target.tensor, rung)


def _judge_tensor(figures: Mapping[str, float], graph: Built, recipe: Recipe, source_bytes: int) -> list[GateResult]:
    results = tensor_gates(figures, recipe.tensor)
    size = graph.path(tensor_stages.MODEL).stat().st_size
    results.append(gate("size_ratio", size / source_bytes, "<=", recipe.max_size_ratio))
    if "integer_layers" in figures:
        integer, floating = figures["integer_layers"], figures["float_layers"]
        share = integer / max(1, integer + floating)
        results.append(gate("integer_layer_share", share, ">=", MIN_INTEGER_LAYER_SHARE))
    return results


def _judge_budget(target: Target, memory_bytes: int, graph: Built, given: Built) -> list[GateResult]:
    """Latency is judged only where this machine has the target's arithmetic; elsewhere the device's probe tells."""
    figures, budget = {"memory_bytes": float(memory_bytes)}, target.budget
    if target.tensor_kernels != tensor_kernels():
        budget = budget.model_copy(update={"latency_ms": None})
    elif budget.latency_ms is not None:
        inputs = tensor_stages.load(given.path("inputs.npz"))
        figures["latency_ms"] = measure_latency_ms(graph.path(tensor_stages.MODEL), inputs)
    return budget_gates(figures, budget)


# language models


def _compile_language(job: CompileJob, recipe: Recipe, shop: Workshop, report: Report) -> _Model:
    if job.golden is not None:
        raise InvalidInputError("a golden set was given for a language model", remedy="publish it without --golden")
    source, digest = job.source, job.source_digest
    if job.source_format == "gguf":
        imported = language_stages.import_gguf(shop, source, digest, report)
        source, digest = imported.path(language_stages.MODEL), imported.digest
    fingerprint = _fingerprint(job, source, shop, digest)
    language = recipe.language
    precision, provider = language.precision or "fp32", job.target.language.provider
    built = language_stages.build_genai(shop, source, fingerprint, precision, provider, builder_options(language))
    notes = language_notes(job.recipe, shop, source, fingerprint, precision, provider, built)
    reference = language_stages.source_logits(shop, source, fingerprint, language.gate_tokens)
    gates: list[GateResult] = []
    size = 0
    for candidate in _mixed_bits(shop, source, fingerprint, language, provider, built):
        figures = language_stages.measure(shop, candidate, reference)
        size = _size_bytes(candidate.path(language_stages.MODEL))
        gates = _judge_language(figures, size / max(1, _size_bytes(source)), recipe)
        shop.progress.say("measure", "; ".join(f"{r.name} {r.value:g} ({r.sense} {r.limit:g})" for r in gates))
        built = candidate
        if all(result.passed for result in gates):
            break
    config = language_stages.limited_config(shop, built, language.context_tokens)
    context = int(config.read_json(language_stages.CONFIG)["model"]["context_length"])
    memory = _language_memory_bytes(config.read_json(language_stages.CONFIG), size, context)
    gates += budget_gates({"memory_bytes": memory}, job.target.budget.model_copy(update={"latency_ms": None}))
    require_all(gates)
    golden = language_stages.golden(shop, built)
    parts = [
        Part(path.removeprefix("model/"), built.path(path), digest)
        for path, digest in built.files.items()
        if path != f"model/{language_stages.CONFIG}"
    ]
    parts += [
        Part(name, stage.path(name), stage.files[name])
        for stage, name in ((config, language_stages.CONFIG), (golden, language_stages.GOLDEN))
    ]
    return _Model(
        parts=parts,
        graph=built,
        runtime="onnxruntime-genai",
        precision=precision,
        entry=".",
        gates=gates,
        golden=Golden(
            path=language_stages.GOLDEN,
            num_cases=len(golden.read_json(language_stages.GOLDEN)["cases"]),
            min_token_agreement=language.golden_min_token_agreement,
        ),
        vision=None,
        context_tokens=context,
        memory_bytes=memory,
        notes=notes,
    )


def _mixed_bits(
    shop: Workshop, source: Path, fingerprint: str, language: LanguageRecipe, provider: str, built: Built
) -> Iterator[Built]:
    """`built`, then with more and more 8-bit layers; what a graph does not have is not tried."""
    yield built
    if language.precision != "int4" or provider != "cpu":
        return
    for rung in filter(None, language.eight_bit_rungs):
        eight = language_stages.build_genai(shop, source, fingerprint, "int8", provider, {"algo_config": "k_quant"})
        yield language_stages.raise_bits(shop, built, eight, rung)


def _judge_language(figures: Mapping[str, float], size_ratio: float, recipe: Recipe) -> list[GateResult]:
    limit = 3.0 if recipe.language.precision == "fp32" else recipe.max_size_ratio
    return [*language_gates(figures, recipe.language), gate("size_ratio", size_ratio, "<=", limit)]


def _language_memory_bytes(config: Mapping[str, Any], size_bytes: int, context_tokens: int) -> int:
    """Weights (mapped and packed once more), the KV cache of one full context, and the runtime."""
    decoder = config["model"]["decoder"]
    per_token = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * 4
    return 2 * size_bytes + per_token * context_tokens + 2 * RUNTIME_OVERHEAD_BYTES


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
