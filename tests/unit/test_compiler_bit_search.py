"""A 4-bit language model whose gates no rung holds: a search finds the few layers that need 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compiler.cache import BuildCache
from compiler.compile_job import CompileJob
from compiler.many import TargetResult
from compiler.mixed_bits import layers_by_bits
from compiler.pipeline import Artefact, compile_model
from compiler.recipe import parse_recipe
from compiler.report import report_of
from compiler.targets import load_target
from model_registry.sources import Source
from tests.fakes.compiler_models import write_llama_gguf
from wire.errors import GateFailedError

pytestmark = pytest.mark.slow
ANY = {"max_perplexity_ratio": 100, "max_kl": 100, "max_worst_slice_kl": 100, "min_greedy_agreement": 0}
ANY |= {"min_exact_match": 0, "gate_tokens": 128, "algorithm": "default", "runtime": "onnxruntime"}


def test_the_search_raises_few_layers_until_the_gate_holds_and_reports_what_it_tried(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "small.gguf")
    cache = BuildCache(tmp_path / "cache")

    def build(out: str, **language: Any) -> Artefact:
        recipe = parse_recipe({"max_size_ratio": 10, "language": {**ANY, "eight_bit_rungs": [], **language}})
        source = tmp_path / "small.gguf"
        job = CompileJob("small", "language", load_target("cpu-x86"), recipe, "gguf", source, "ab" * 32)
        return compile_model(job, tmp_path / out, cache, lambda *event: None, {})

    def kl(artefact: Artefact) -> float:
        return next(gate.value for gate in artefact.manifest.gates if gate.name == "kl_nats")

    four = build("four")
    rungs = [["attention", "down", "gate-up"]]
    limit = 0.85 * kl(four)
    most = build("most", max_kl=limit, eight_bit_rungs=rungs)
    found = build("found", max_kl=limit)
    assert kl(found) <= limit < kl(four)
    bits = layers_by_bits(found.folder)
    raised = [name for name, width in bits.items() if width == 8]
    assert 0 < len(raised) < len(bits)
    assert four.manifest.size_bytes < found.manifest.size_bytes < most.manifest.size_bytes
    note = next(note for note in found.notes if "raised to 8 bits" in note)
    assert note.startswith(f"{len(raised)} of {len(bits)} layers")
    assert all(name in note for name in raised)
    source = Source("gguf", "language", tmp_path, (), "")
    report = report_of("small", source, [TargetResult(load_target("cpu-x86"), 1.0, found)])
    assert len(report.searched) >= 3
    assert any(point.is_on_front for point in report.points)
    with pytest.raises(GateFailedError, match="kl_nats"):
        build("without", max_kl=limit, search=False)
