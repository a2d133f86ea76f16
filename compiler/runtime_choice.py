"""Which runtime runs an artefact on its target, with the reason; data for the manifest, the report and the agent.

What the recipe names is taken. Else a language model on a CPU whose arithmetic this machine has is measured: the
agent's own code runs the artefact with each of its runtimes, in a process of its own. The score is the geometric mean
of the rates of one stream and of several; a lead below `TIE_RATIO` goes to the agent's loop, whose streams join and
leave between steps (docs/adr/0005). Where the hardware is not here, a rule decides, and the reason says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.compile_job import CompileJob
from compiler.engine_stage import EngineResult
from compiler.processor import tensor_kernels
from compiler.recipe import Recipe
from compiler.targets import Target
from compiler.tools import ToolCrashedError, ToolError, run_tool
from model_registry.manifest import RuntimeChoice, RuntimeOption

LOOP, GENAI = "onnxruntime", "onnxruntime-genai"
TIE_RATIO = 1.1
MEASURE = "edge_agent.runtimes.language_speed:measure"
MEASURE_TIMEOUT_S = 300.0
RATES = ("decode_1_tokens_per_s", "decode_4_tokens_per_s")
_JOINS = "its streams join and leave between steps and share the weights"

Speeds = Mapping[str, Mapping[str, float] | str]
"""Runtime -> figures of `language_speed`, or why there are none."""


def measure_speeds(folder: Path) -> dict[str, dict[str, float] | str]:
    """What each of the agent's runtimes makes of the language model in `folder`, on this machine, one thread."""
    found: dict[str, dict[str, float] | str] = {}
    for runtime in (LOOP, GENAI):
        try:
            arguments = {"folder": str(folder), "runtime": runtime}
            found[runtime] = dict(run_tool(MEASURE, arguments, timeout_s=MEASURE_TIMEOUT_S))
        except (ToolError, ToolCrashedError) as error:
            found[runtime] = str(error.message).splitlines()[0][:200]
    return found


def can_measure(recipe: Recipe, target: Target) -> bool:
    """Whether figures of this machine say something of a language model on `target`, and are asked for."""
    is_here = target.language.provider == "cpu" and target.tensor_kernels == tensor_kernels()
    return recipe.language.runtime == "auto" and is_here


def choose_for_language(recipe: Recipe, target: Target, speeds: Speeds | None) -> RuntimeChoice:
    """The choice among the agent's runtimes; `speeds` where `can_measure`."""
    named = recipe.language.runtime
    if named != "auto":
        other = GENAI if named == LOOP else LOOP
        return _choice("recipe", named, "the recipe names it", other, f"the recipe names {named}")
    if target.language.provider != "cpu":
        only = f"it alone runs graphs for {target.language.provider}"
        return _choice(
            "rule", GENAI, only, LOOP, f"the agent's loop runs graphs for the CPU, not for {target.language.provider}"
        )
    ran = {name: figures for name, figures in (speeds or {}).items() if not isinstance(figures, str)}
    if speeds is None or not ran:
        why = (
            f"not measured: this machine has not the arithmetic of {target.name}" if speeds is None else "none ran here"
        )
        return _choice("rule", LOOP, f"{_JOINS}; {why}", GENAI, "it runs a generator and a thread for every stream")
    return _measured(speeds, ran)


def _measured(speeds: Speeds, ran: Mapping[str, Mapping[str, float]]) -> RuntimeChoice:
    scores = {name: math.sqrt(math.prod(figures[rate] for rate in RATES)) for name, figures in ran.items()}
    chosen = max(scores, key=lambda name: scores[name] * (TIE_RATIO if name == LOOP else 1.0))
    other = GENAI if chosen == LOOP else LOOP
    if other not in ran:
        return _choice("measured", chosen, "the only one that runs it", other, f"does not run it: {speeds[other]}", ran)
    ratio = scores[chosen] / scores[other]
    told = (
        f"{ratio:.2f} times the tokens per second of {other} over one and four streams, one thread, {tensor_kernels()}"
    )
    if ratio < TIE_RATIO:
        told += f"; below {TIE_RATIO} it is a tie, and {_JOINS}" if chosen == LOOP else ""
    return _choice("measured", chosen, told, other, f"{1 / ratio:.2f} times the tokens per second of {chosen}", ran)


def choose_for_tensors(job: CompileJob, engine: EngineResult | None) -> RuntimeChoice:
    """The target's engine, where it has one and the recipe does not decline it; ONNX Runtime runs it until then."""
    named, wanted = job.recipe.tensor.runtime, job.target.engine
    if wanted is None or engine is None:
        return RuntimeChoice(
            basis="rule",
            chosen=RuntimeOption(
                runtime="onnxruntime", reason=f"target {job.target.name} has no engine: nothing else runs tensors there"
            ),
        )
    if named == LOOP:
        return _choice("recipe", LOOP, "the recipe names it", wanted.builder, "the recipe names onnxruntime")
    where = f"built for compute capability {', '.join(wanted.compute_capabilities)}"
    if engine.built is None:
        where = f"not built here ({engine.reason[:160]}): a builder with such a GPU or the device itself builds it"
    basis = "rule" if named == "auto" else "recipe"
    reason = (
        "the target's engine comes before ONNX Runtime" if named == "auto" else "the recipe names it"
    ) + f"; {where}"
    until = "runs the portable graph until the engine is there, and wherever it does not load"
    return _choice(basis, wanted.builder, reason, LOOP, until)


def _choice(
    basis: Any, chosen: Any, reason: str, other: Any, why_not: str, figures: Mapping[str, Mapping[str, float]] = {}
) -> RuntimeChoice:
    return RuntimeChoice(
        basis=basis,
        chosen=RuntimeOption(runtime=chosen, reason=reason[:300], figures=dict(figures.get(chosen, {}))),
        rejected=[RuntimeOption(runtime=other, reason=why_not[:300], figures=dict(figures.get(other, {})))],
    )
