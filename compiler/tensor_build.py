"""A tensor model for one target: the graphs that the recipe allows, best first, until the gates hold.

If no rung of the ladder holds, the layers that must stay float are searched for (`compiler.float_search`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from compiler import tensor_stages
from compiler.cache import Built
from compiler.compile_job import RUNTIME_OVERHEAD_BYTES, BuiltModel, CompileJob, Tried, fingerprint, size_bytes
from compiler.float_search import Found, Judge, Measure, search_float_layers
from compiler.gates import budget_gates, gate, require_all, tensor_gates
from compiler.latency import measure_latency_ms
from compiler.modelopt import ModelOpt
from compiler.options import tensor_notes
from compiler.package import Part
from compiler.processor import tensor_kernels
from compiler.recipe import Recipe
from compiler.targets import Target
from compiler.tensor_model import Signature, fit_vision
from compiler.tensor_stages import TensorSource
from compiler.workshop import Workshop
from model_registry.manifest import GateResult, Golden
from wire.errors import InvalidInputError


def build_tensor_model(job: CompileJob, recipe: Recipe, shop: Workshop, modelopt: ModelOpt | str) -> BuiltModel:
    """The artefact's graph and golden set, its gates held. Raises `GateFailedError` with the figures."""
    from compiler.photographs import IMAGENET

    path, digest = job.source, job.source_digest
    if job.source_format == "pt2":
        imported = tensor_stages.import_program(shop, path, digest)
        path, digest = imported.path(tensor_stages.MODEL), imported.digest
    name = fingerprint(job, path, shop, digest)
    cleaned = tensor_stages.clean(shop, path, name)
    signature = Signature.from_dict(cleaned.read_json("signature.json"))
    source = TensorSource(path, name, cleaned, signature, fit_vision(signature, job.vision, IMAGENET), job.data)
    given = tensor_stages.inputs(shop, source, "held-out", recipe.tensor.gate_crops if source.is_image_model else 8)
    expected = tensor_stages.answers(shop, source, given)
    built = _Candidates(job, recipe, shop, source, modelopt)

    def measure(graph: Built) -> dict[str, float]:
        is_8_bit = built.precision == "int8"
        return tensor_stages.measure(shop, graph, given, expected, job.target.tensor_kernels, is_8_bit=is_8_bit)

    def judge(figures: Mapping[str, float], graph: Built) -> list[GateResult]:
        gates = _judge_tensor(figures, graph, recipe, size_bytes(path))
        tried.append(
            Tried(_label(built.precision, figures), graph.path(tensor_stages.MODEL).stat().st_size, tuple(gates))
        )
        shop.progress.say("measure", "; ".join(f"{r.name} {r.value:g} ({r.sense} {r.limit:g})" for r in gates))
        return gates

    tried: list[Tried] = []
    gates: list[GateResult] = []
    graph = cleaned
    for graph in built.candidates():
        gates = judge(measure(graph), graph)
        if all(result.passed for result in gates):
            break
    else:
        found = built.search(measure, judge)
        if found is not None:
            graph, gates = found.graph, found.gates
    size = graph.path(tensor_stages.MODEL).stat().st_size
    memory = 3 * size + RUNTIME_OVERHEAD_BYTES
    gates += _judge_budget(job.target, memory, graph, given)
    require_all(gates)
    golden = tensor_stages.golden(shop, source, job.golden)
    return BuiltModel(
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
        tried=tuple(tried),
    )


class _Candidates:
    """The graphs to try for one target, best first; the first whose gates hold is taken."""

    def __init__(
        self, job: CompileJob, recipe: Recipe, shop: Workshop, source: TensorSource, modelopt: ModelOpt | str
    ) -> None:
        self.precision: str = recipe.tensor.precision or "fp32"
        self.notes: list[str] = []
        self._calibrated: Built | None = None
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
                raise InvalidInputError(
                    f"fp8 is written by ModelOpt alone, and {self._modelopt}", remedy="see docs/compiler.md, ModelOpt"
                )
            self.notes.append(f"quantised by ONNX Runtime, not ModelOpt: {self._modelopt}")
        self._calibrated = tensor_stages.calibrate(shop, source.cleaned, samples)
        for rung in recipe.float_rungs:
            yield tensor_stages.quantise(shop, self._calibrated, self._job.target.tensor, rung)

    def search(self, measure: Measure, judge: Judge) -> Found | None:
        """The few layers that must stay float, once no rung of the ladder holds; None where nothing can be searched."""
        calibrated = self._calibrated
        if calibrated is None or not self._recipe.tensor.search:
            return None
        layers = list(calibrated.read_json(tensor_stages.LAYERS))
        scheme = self._job.target.tensor
        found = search_float_layers(
            layers, lambda floats: tensor_stages.quantise(self._shop, calibrated, scheme, floats), measure, judge
        )
        if found is None or not all(result.passed for result in found.gates):
            return None  # so many floats that it is no 8-bit model: the ladder's figures say more
        if found.result.kept:
            kept, tried = sorted(found.result.kept), len(found.result.evaluations)
            self.notes.append(f"{len(kept)} of {len(layers)} layers stay float ({tried} tried): {', '.join(kept)}")
        return found


def _label(precision: str, figures: Mapping[str, float]) -> str:
    if "float_layers" not in figures:
        return precision
    num_layers = figures["float_layers"] + figures["integer_layers"]
    return f"{precision}, {figures['float_layers']:.0f} of {num_layers:.0f} layers float"


def _judge_tensor(figures: Mapping[str, float], graph: Built, recipe: Recipe, source_bytes: int) -> list[GateResult]:
    results = tensor_gates(figures, recipe.tensor)
    size = graph.path(tensor_stages.MODEL).stat().st_size
    results.append(gate("size_ratio", size / source_bytes, "<=", recipe.max_size_ratio))
    if "integer_layers" in figures:
        integer, floating = figures["integer_layers"], figures["float_layers"]
        share = integer / max(1, integer + floating)
        results.append(gate("integer_layer_share", share, ">=", recipe.tensor.min_integer_layer_share))
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
