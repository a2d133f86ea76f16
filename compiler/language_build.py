"""A language model for one target: 4 bits, then more and more layers of 8 bits, until the gates hold.

If no rung of the ladder holds, the few layers that must have 8 bits are searched for (`compiler.language_candidates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler import language_stages
from compiler.block_size import DEFAULT as BLOCK
from compiler.block_size import fit_blocks
from compiler.cache import Built
from compiler.compile_job import RUNTIME_OVERHEAD_BYTES, BuiltModel, CompileJob, Tried, fingerprint, size_bytes
from compiler.gates import budget_gates, gate, language_gates, require_all
from compiler.language_candidates import LanguageCandidates
from compiler.options import builder_options, language_notes
from compiler.package import Part
from compiler.progress import Report
from compiler.recipe import Recipe
from compiler.runtime_choice import can_measure, choose_for_language
from compiler.workshop import Workshop
from model_registry.manifest import GateResult, Golden
from wire.errors import InvalidInputError


def build_language_model(job: CompileJob, recipe: Recipe, shop: Workshop, report: Report) -> BuiltModel:
    """The artefact's folder and golden set, its gates held. Raises `GateFailedError` with the figures."""
    if job.golden is not None:
        raise InvalidInputError("a golden set was given for a language model", remedy="publish it without --golden")
    source, digest = job.source, job.source_digest
    if job.source_format == "gguf":
        imported = language_stages.import_gguf(shop, source, digest, report)
        source, digest = imported.path(language_stages.MODEL), imported.digest
    name = fingerprint(job, source, shop, digest)
    language = recipe.language
    precision, provider = language.precision or "fp32", job.target.language.provider
    asked = builder_options(language)
    options = fit_blocks(asked, source)
    built = language_stages.build_genai(shop, source, name, precision, provider, options)
    notes = language_notes(job.recipe, shop, source, name, precision, provider, built)
    if options != asked:
        notes = (*notes, f"blocks of {options['block_size']} weights: in blocks of {BLOCK} a row has an odd number")
    reference = language_stages.source_logits(shop, source, name, language.gate_tokens)
    candidates = LanguageCandidates(shop, source, name, language, provider, built)
    tried: list[Tried] = []

    def measure(candidate: Built) -> dict[str, float]:
        shop.cache.touch(reference)
        return language_stages.measure(shop, candidate, reference)

    def judge(figures: Mapping[str, float], candidate: Built) -> list[GateResult]:
        size = size_bytes(candidate.path(language_stages.MODEL))
        found = _judge_language(figures, size / max(1, size_bytes(source)), recipe)
        tried.append(Tried(candidates.label(candidate), size, tuple(found)))
        shop.progress.say("measure", "; ".join(f"{r.name} {r.value:g} ({r.sense} {r.limit:g})" for r in found))
        return found

    gates: list[GateResult] = []
    for candidate in candidates.rungs():
        built, gates = candidate, judge(measure(candidate), candidate)
        if all(result.passed for result in gates):
            break
    else:
        found = candidates.search(measure, judge)
        if found is not None and all(result.passed for result in found.gates):
            built, gates = found.graph, found.gates
            kept, num_tried = sorted(found.result.kept or ()), len(found.result.evaluations)
            words = f"{len(kept)} of {len(candidates.layers())} layers were raised to 8 bits ({num_tried} tried)"
            notes = (*notes, f"{words}: {', '.join(kept)}")
    size = size_bytes(built.path(language_stages.MODEL))
    config = language_stages.limited_config(shop, built, language.context_tokens)
    context = int(config.read_json(language_stages.CONFIG)["model"]["context_length"])
    memory = _language_memory_bytes(config.read_json(language_stages.CONFIG), size, context)
    gates += budget_gates({"memory_bytes": memory}, job.target.budget.model_copy(update={"latency_ms": None}))
    require_all(gates)
    golden = language_stages.golden(shop, built)
    speeds = language_stages.speeds(shop, built) if can_measure(recipe, job.target) else None
    choice = choose_for_language(recipe, job.target, speeds)
    parts = [
        Part(path.removeprefix("model/"), built.path(path), digest)
        for path, digest in built.files.items()
        if path != f"model/{language_stages.CONFIG}"
    ]
    parts += [
        Part(name, stage.path(name), stage.files[name])
        for stage, name in ((config, language_stages.CONFIG), (golden, language_stages.GOLDEN))
    ]
    return BuiltModel(
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
        tried=tuple(tried),
        runtime_choice=choice,
    )


def _judge_language(figures: Mapping[str, float], size_ratio: float, recipe: Recipe) -> list[GateResult]:
    limit = 3.0 if recipe.language.precision == "fp32" else recipe.max_size_ratio
    return [*language_gates(figures, recipe.language), gate("size_ratio", size_ratio, "<=", limit)]


def _language_memory_bytes(config: Mapping[str, Any], size_bytes: int, context_tokens: int) -> int:
    """Weights (mapped and packed once more), the KV cache of one full context, and the runtime."""
    decoder = config["model"]["decoder"]
    per_token = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * 4
    return 2 * size_bytes + per_token * context_tokens + 2 * RUNTIME_OVERHEAD_BYTES
