"""From a source model to a verified artefact for one target: import, clean, quantise, gate, golden, package.

Stages are cached by what decides them, so targets with the same scheme share the work. Progress is reported as
(stage, share of the whole, message). The result is a folder and its manifest; nothing is uploaded or signed here.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compiler import language_model, photographs, tensor_model
from compiler.cache import BuildCache
from compiler.gates import gate, mean_cosine, require_all, top1_agreement
from compiler.gguf_import import import_gguf
from compiler.graph_facts import read_graph
from compiler.quantise import count_integer_kernels, quantise
from compiler.recipe import Recipe, TensorRecipe
from compiler.targets import Target
from compiler.tensorrt import NoBuilder, build_engine, find_builder
from model_registry.chunking import describe_folder
from model_registry.manifest import Engine, GateResult, Golden, Kind, Manifest, Requirements, Vision, sha256
from wire.errors import GateFailedError, InvalidInputError

FORMAT_VERSION = 1  # raise when a stage's output changes for the same inputs and tools
MAX_GOLDEN_BYTES = 256 << 20
_TOOLS = ("gguf", "onnx", "onnxruntime", "onnxruntime-genai", "onnxslim", "torch", "transformers")
_RUNTIME_OVERHEAD_BYTES = 96 << 20
ENGINE_FILE = "model.engine"

Report = Callable[[str, float, str], None]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CompileJob:
    """What to compile: `source` is an ONNX or GGUF file or a Hugging Face style folder."""

    name: str
    kind: Kind
    target: Target
    recipe: Recipe
    source_format: str
    source: Path
    source_digest: str
    golden: Path | None = None
    vision: Vision | None = None


@dataclass(frozen=True)
class Artefact:
    """A finished artefact: the manifest describes exactly the files in `folder`."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class _Model:
    """A built model before packaging."""

    folder: Path
    runtime: str
    precision: str
    entry: str
    gates: list[GateResult]
    golden: Golden
    vision: Vision | None
    context_tokens: int
    memory_bytes: int


def compile_model(job: CompileJob, out: Path, cache: BuildCache, report: Report) -> Artefact:
    """Compile `job` into the folder `out` (new). Raises `GateFailedError` or another `ForeshoreError`."""
    recipe = job.recipe.filled(job.target)
    tensor = job.source_format == "onnx"
    if tensor != (job.kind == "tensor"):
        raise InvalidInputError(f"a {job.source_format} source is not a {job.kind} model", remedy="give the right kind")
    model = (_compile_tensor if tensor else _compile_language)(job, recipe, out, cache, report)
    engine = _add_engine(job, model, cache, report)
    report("package", 0.95, "cutting into chunks")
    (out / "recipe.json").write_text(_recipe_json(recipe, job.target, engine))
    files = describe_folder(out)
    manifest = Manifest(
        name=job.name,
        kind=job.kind,
        target=job.target.name,
        runtime=model.runtime,  # type: ignore[arg-type]
        precision=model.precision,
        files=files,
        entry=model.entry,
        requires=Requirements(
            memory_bytes=model.memory_bytes,
            disk_bytes=sum(file.size_bytes for file in files),
            architectures=job.target.architectures,
            cpu_features=job.target.cpu_features,
        ),
        context_tokens=model.context_tokens,
        graph=read_graph(out, model.entry),
        engine=engine if isinstance(engine, Engine) else None,
        golden=model.golden,
        vision=model.vision,
        gates=model.gates,
        recipe_digest=recipe.digest,
        source_digest=job.source_digest,
        tools=tool_versions(),
    )
    report("package", 1.0, f"{manifest.size_bytes / 1e6:.1f} MB in {len(manifest.chunk_list())} chunks")
    return Artefact(out, manifest)


def _add_engine(job: CompileJob, model: _Model, cache: BuildCache, report: Report) -> Engine | NoBuilder | None:
    """Put the target's engine beside the portable graph; `NoBuilder` says why the artefact goes without."""
    wanted = job.target.engine
    if wanted is None:
        return None
    builder = find_builder(wanted.builder)
    if job.kind != "tensor":
        builder = NoBuilder(
            "the language model's graph holds ONNX Runtime's own operators, which TensorRT does not read"
        )
    if isinstance(builder, NoBuilder):
        report("engine", 0.9, f"portable ONNX only: {builder.reason}")
        return builder
    report("engine", 0.9, f"{builder.name} {builder.version} for {', '.join(wanted.compute_capabilities)}")
    graph = model.folder / model.entry
    inputs = {"graph": sha256(graph.read_bytes()), "engine": wanted.model_dump(), "version": builder.version}
    built = cache.get_or_build("engine", inputs, lambda to: build_engine(builder, wanted, graph, to / ENGINE_FILE))
    shutil.copyfile(built.folder / ENGINE_FILE, model.folder / ENGINE_FILE)
    return Engine(
        path=ENGINE_FILE,
        builder=wanted.builder,
        builder_version=builder.version,
        compute_capabilities=wanted.compute_capabilities,
    )


def _recipe_json(recipe: Recipe, target: Target, engine: Engine | NoBuilder | None) -> str:
    """What a device or a person needs to build the artefact again: the filled recipe, the target, the engine's fate."""
    document = recipe.model_dump(mode="json") | {"target": target.model_dump(mode="json")}
    if isinstance(engine, NoBuilder):
        document["engine_not_built"] = engine.reason
    return json.dumps(document, indent=1, sort_keys=True)


def tool_versions() -> dict[str, str]:
    """Versions of everything that writes a part of an artefact."""
    return {name: metadata.version(name) for name in _TOOLS} | {"format": str(FORMAT_VERSION)}


def _inputs(job: CompileJob, **more: Any) -> dict[str, Any]:
    return {"source": job.source_digest, "tools": tool_versions(), "machine": platform.machine(), **more}


# tensor models


def _compile_tensor(job: CompileJob, recipe: Recipe, out: Path, cache: BuildCache, report: Report) -> _Model:
    report("export", 0.05, "checking and simplifying the graph")
    cleaned = cache.get_or_build("clean", _inputs(job), lambda to: tensor_model.clean(job.source, to / "model.onnx"))
    reference = cleaned.folder / "model.onnx"
    signature = tensor_model.read_signature(job.source)
    vision = tensor_model.fit_vision(signature, job.vision, photographs.IMAGENET)
    held = _held_inputs(signature, vision, recipe.tensor)
    expected = tensor_model.run_batches(job.source, held)
    precision = recipe.tensor.precision
    if precision == "int8" and (vision is None or signature.image_input is None):
        report("quantise", 0.2, "not an image model: no calibration data, numbers stay float")
        precision = "fp32"
    results: list[GateResult] = []
    path = reference
    for rung in recipe.tensor.float_rungs if precision == "int8" else [None]:
        if rung is not None and vision is not None:
            report("quantise", 0.3, f"8 bits, first {rung} layers float")
            path = _quantised(job, recipe.tensor, cache, reference, vision, rung)
        report("gate", 0.7, "comparing with the source model")
        results = _judge_tensor(expected, tensor_model.run_batches(path, held), recipe.tensor)
        results += _judge_files(job, path, recipe, precision or "fp32")
        report("gate", 0.75, "; ".join(f"{r.name} {r.value:g} ({r.sense} {r.limit:g})" for r in results))
        if all(result.passed for result in results):
            break
    require_all(results)
    out.mkdir(parents=True)
    shutil.copyfile(path, out / "model.onnx")
    report("golden", 0.85, "writing golden inputs and outputs")
    golden = _tensor_golden(job, recipe.tensor, signature, vision, out)
    memory = 3 * path.stat().st_size + _RUNTIME_OVERHEAD_BYTES
    return _Model(out, "onnxruntime", precision or "fp32", "model.onnx", results, golden, vision, 0, memory)


def _held_inputs(signature: tensor_model.Signature, vision: Vision | None, recipe: TensorRecipe) -> dict[str, Array]:
    if signature.image_input is not None and vision is not None:
        return {signature.image_input: photographs.augmented_crops("held-out", recipe.gate_crops, vision)}
    return tensor_model.random_inputs(signature, 8)


def _quantised(
    job: CompileJob, recipe: TensorRecipe, cache: BuildCache, reference: Path, vision: Vision, rung: int
) -> Path:
    samples = photographs.augmented_crops("calibration", recipe.calibration_crops, vision)
    scheme = job.target.tensor
    inputs = _inputs(job, scheme=scheme.model_dump(), float_layers=rung, calibration=photographs.digest_of(samples))
    built = cache.get_or_build(
        "quantise",
        inputs,
        lambda to: quantise(reference, to / "model.onnx", scheme, samples, num_float_layers=rung),
    )
    return built.folder / "model.onnx"


def _judge_tensor(expected: dict[str, Array], found: dict[str, Array], recipe: TensorRecipe) -> list[GateResult]:
    name = next(iter(expected))
    results = [gate("cosine", mean_cosine(expected[name], found[name]), ">=", recipe.min_cosine)]
    if expected[name].ndim == 2 and expected[name].shape[1] > 1:
        agreement = top1_agreement(expected[name], found[name])
        results.append(gate("top1_agreement", agreement, ">=", recipe.min_top1_agreement))
    return results


def _judge_files(job: CompileJob, path: Path, recipe: Recipe, precision: str) -> list[GateResult]:
    ratio = path.stat().st_size / job.source.stat().st_size
    results = [gate("size_ratio", ratio, "<=", recipe.max_size_ratio)]
    if precision == "int8":
        integer, floating = count_integer_kernels(path)
        results.append(gate("integer_kernel_share", integer / max(1, integer + floating), ">=", 0.4))
    return results


def _tensor_golden(
    job: CompileJob, recipe: TensorRecipe, signature: tensor_model.Signature, vision: Vision | None, out: Path
) -> Golden:
    path = out / "golden.npz"
    if job.golden is not None:
        num_cases = _check_golden(job.golden, signature)
        shutil.copyfile(job.golden, path)
    else:
        if signature.image_input is not None and vision is not None:
            inputs = {signature.image_input: photographs.whole_images("held-out", vision)}
        else:
            inputs = tensor_model.random_inputs(signature, 4)
        outputs = tensor_model.run_batches(job.source, inputs)
        num_cases = len(next(iter(inputs.values())))
        arrays = {f"input.{name}": value for name, value in inputs.items()}
        arrays |= {f"output.{name}": value for name, value in outputs.items()}
        np.savez(path, **arrays)  # type: ignore[arg-type]
    has_classes = vision is not None
    return Golden(
        path="golden.npz",
        num_cases=num_cases,
        min_cosine=recipe.golden_min_cosine,
        min_top1_agreement=recipe.golden_min_top1_agreement if has_classes else None,
    )


def _check_golden(path: Path, signature: tensor_model.Signature) -> int:
    """The number of cases in the publisher's golden set, which must fit the model. It is read without pickles."""
    if path.stat().st_size > MAX_GOLDEN_BYTES:
        raise InvalidInputError(f"golden set has {path.stat().st_size} bytes", remedy=f"at most {MAX_GOLDEN_BYTES}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            lengths = {name: len(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InvalidInputError(f"golden set cannot be read: {error}", remedy="write it with numpy.savez") from error
    wanted = {f"input.{name}" for name in signature.inputs}
    known = wanted | {f"output.{name}" for name in signature.outputs}
    has_output = any(name.startswith("output.") for name in lengths)
    if not wanted <= set(lengths) or set(lengths) - known or not has_output or len(set(lengths.values())) != 1:
        raise InvalidInputError(
            f"golden set holds {sorted(lengths.items())}",
            remedy=f"wanted: {sorted(known)}, the same number of cases each",
        )
    return next(iter(lengths.values()))


# language models


def _compile_language(job: CompileJob, recipe: Recipe, out: Path, cache: BuildCache, report: Report) -> _Model:
    source = job.source
    if job.source_format == "gguf":
        report("import", 0.02, "reading the GGUF file")
        imported = cache.get_or_build("import", _inputs(job), lambda to: _import(job.source, to, report))
        source = imported.folder / "model"
    precision = recipe.language.precision or "fp32"
    report("build", 0.15, f"building {precision} weights")
    limit = recipe.language.context_tokens
    built = cache.get_or_build(
        "genai",
        _inputs(job, precision=precision, context=limit),
        lambda to: language_model.build_genai(source, to / "model", precision, limit),
    )
    folder = built.folder / "model"
    report("gate", 0.55, "the source model reads held text")
    reference = cache.get_or_build(
        "source-logits",
        _inputs(job, tokens=recipe.language.gate_tokens),
        lambda to: _save_logits(source, recipe.language.gate_tokens, to),
    )
    held = language_model.Held(
        np.load(reference.folder / "tokens.npy"), np.load(reference.folder / "logits.npy", mmap_mode="r")
    )
    report("gate", 0.7, "the artefact reads held text")
    results = language_model.judge(held, language_model.artefact_logits(folder, held.tokens), recipe.language)
    ratio = _folder_bytes(folder) / max(1, _folder_bytes(source))
    results.append(gate("size_ratio", ratio, "<=", recipe.max_size_ratio if precision != "fp32" else 3.0))
    report("gate", 0.85, "; ".join(f"{r.name} {r.value:g} ({r.sense} {r.limit:g})" for r in results))
    require_all(results)
    shutil.copytree(folder, out, symlinks=False)
    report("golden", 0.9, "writing golden continuations")
    return _Model(
        out,
        "onnxruntime-genai",
        precision,
        ".",
        results,
        _language_golden(job, recipe, out),
        None,
        _context_tokens(out),
        _memory_bytes(out),
    )


def _import(source: Path, to: Path, report: Report) -> None:
    import_gguf(source, to / "model", lambda share, what: report("import", 0.02 + 0.1 * share, what))


def _save_logits(source: Path, num_tokens: int, to: Path) -> None:
    held = language_model.source_logits(source, num_tokens)
    np.save(to / "tokens.npy", held.tokens)
    np.save(to / "logits.npy", held.logits.astype(np.float32))


def _language_golden(job: CompileJob, recipe: Recipe, out: Path) -> Golden:
    if job.golden is not None:
        raise InvalidInputError("a golden set was given for a language model", remedy="publish it without --golden")
    cases = language_model.golden_cases(out)
    if not all(case["tokens"] for case in cases):
        raise GateFailedError("the artefact answers a prompt with nothing", remedy="check the source model")
    (out / "golden.json").write_text(json.dumps({"cases": cases}))
    limit = recipe.language.golden_min_token_agreement
    return Golden(path="golden.json", num_cases=len(cases), min_token_agreement=limit)


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "genai_config.json").read_text())["model"])


def _context_tokens(folder: Path) -> int:
    return int(_config(folder)["context_length"])


def _memory_bytes(folder: Path) -> int:
    """Weights (mapped and packed once more), the KV cache of one full context, and the runtime."""
    decoder = _config(folder)["decoder"]
    per_token = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * 4
    return 2 * _folder_bytes(folder) + per_token * _context_tokens(folder) + 2 * _RUNTIME_OVERHEAD_BYTES


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
