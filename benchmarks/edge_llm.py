"""Language on the device: our runtime against its peers, and the agent against its own runtime.

Every engine is a process that stays loaded; they take turns, and the best of the rounds counts, so that a neighbour's
load falls on all of them alike. One thread, the same source weights (SmolLM2-135M-Instruct, 4 bit in each engine's own
scheme), 512 prompt tokens for the first token, 64 for decoding. A ratio is ours over the peer's: speeds above 1 and
memory below 1 are in our favour.

Peers live in an environment of their own, for their pins conflict with ours:

    python3 -m venv PEERS
    CMAKE_ARGS=-DGGML_NATIVE=ON PEERS/bin/pip install llama-cpp-python==0.3.36 openvino-genai==2026.4.1.0
    FORESHORE_PEERS=PEERS scripts/bench edge_llm

A peer that is not there is left out, and a line says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.harness import Goal

GOALS = [
    Goal("ratio_vs_genai_prefill", 1.0, ">="),
    Goal("ratio_vs_genai_decode_1", 0.95, ">="),
    Goal("ratio_vs_genai_decode_8", 1.0, ">="),
    Goal("ratio_vs_genai_memory", 1.0, "<="),
    Goal("ratio_vs_llama_cpp_prefill", 0.9, ">="),
    Goal("ratio_vs_llama_cpp_decode_1", 0.9, ">="),
    Goal("ratio_vs_llama_cpp_decode_8", 1.0, ">="),
    Goal("ratio_vs_llama_cpp_memory", 1.5, "<="),
    Goal("ratio_vs_openvino_prefill", 0.9, ">="),
    Goal("ratio_vs_openvino_decode_1", 1.0, ">="),
    Goal("ratio_vs_openvino_decode_8", 0.9, ">="),
    Goal("ratio_vs_openvino_memory", 1.0, "<="),
    Goal("agent_overhead_ratio", 1.05, "<="),
    Goal("memory_of_limit_1", 1.0, "<="),
    Goal("memory_of_limit_8", 1.0, "<="),
]
NUM_THREADS = 1
PROMPT_TOKENS, DECODE_PROMPT_TOKENS = 512, 64
START_TIMEOUT_S = 300
LIMIT_FACTOR, LIMIT_MB = 2.0, 200.0
"""Resident memory may be twice the artefact and 200 MB."""

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent
_CACHE = _ROOT / ".cache" / "models"
_GGUF = _CACHE / "smollm2-135m-instruct.gguf"
_MODULE_BY_PEER = {"llama_cpp": "llama_cpp", "openvino": "openvino_genai"}


@dataclass(frozen=True)
class Case:
    """What one request measures."""

    name: str
    num_streams: int
    prompt_tokens: int
    max_tokens: int


def run(quick: bool) -> dict[str, float]:
    """Figures by name."""
    from tests.fakes.language_artefact import built_language_model

    folder = built_language_model()
    num_rounds = 3 if quick else 7
    cases = [
        Case("prefill", 1, PROMPT_TOKENS, 2),
        Case("decode_1", 1, DECODE_PROMPT_TOKENS, 32 if quick else 96),
        Case("decode_8", 8, DECODE_PROMPT_TOKENS, 48 if quick else 96),
    ]
    with ExitStack() as stack:
        engines = {name: stack.enter_context(engine) for name, engine in _engines(folder).items()}
        seen = _rounds(engines, cases, num_rounds)
    figures = _figures(seen)
    artefact_mb = sum(file.stat().st_size for file in folder.iterdir()) / (1 << 20)
    limit_mb = LIMIT_FACTOR * artefact_mb + LIMIT_MB
    figures["artefact_mb"] = artefact_mb
    figures["memory_of_limit_1"] = max(one["resident_mb"] for one in seen["ours", "decode_1"]) / limit_mb
    figures["memory_of_limit_8"] = max(one["resident_mb"] for one in seen["ours", "decode_8"]) / limit_mb
    from benchmarks import _edge_agent

    return figures | _edge_agent.overhead(folder, NUM_THREADS, 3 if quick else 7, 32 if quick else 96)


class Engine:
    """A loaded engine in its process."""

    def __init__(self, name: str, python: str, model: Path) -> None:
        self.name, self._python, self._model = name, python, model

    def __enter__(self) -> Self:
        command = [self._python, str(_HERE / "_edge_peer.py"), self.name, str(self._model), str(NUM_THREADS)]
        environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": str(NUM_THREADS)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.loaded_mb = float(self._read()["loaded_mb"])
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def measure(self, case: Case, seed: int) -> dict[str, float]:
        """One request."""
        random = np.random.default_rng(seed)
        prompts = random.integers(1000, 40_000, (case.num_streams, case.prompt_tokens)).tolist()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": case.max_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait(START_TIMEOUT_S)}")
        return dict(json.loads(line))


def _engines(folder: Path) -> dict[str, Engine]:
    engines = {name: Engine(name, sys.executable, folder) for name in ("ours", "genai")}
    python = Path(os.environ.get("FORESHORE_PEERS", _ROOT / ".cache" / "peers")) / "bin" / "python"
    for name, module in _MODULE_BY_PEER.items():
        if not python.exists() or subprocess.run([python, "-c", f"import {module}"], check=False).returncode:
            _say(f"{name} is left out: no {module} in FORESHORE_PEERS ({python}); see benchmarks/edge_llm.py")
            continue
        engines[name] = Engine(name, str(python), _q4_0(python) if name == "llama_cpp" else _GGUF)
    return engines


def _q4_0(python: Path) -> Path:
    """The packaged file in the scheme that llama.cpp has its fastest kernels for."""
    target = _CACHE / "built" / "smollm2-135m-instruct-q4_0.gguf"
    if not target.exists():
        code = (
            "import ctypes, sys, llama_cpp as l; p = l.llama_model_quantize_default_params();"
            "p.ftype = l.LLAMA_FTYPE_MOSTLY_Q4_0; p.allow_requantize = p.pure = True;"
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
        )
        with tempfile.TemporaryDirectory(dir=target.parent) as staging:
            made = Path(staging) / "model.gguf"
            subprocess.run([python, "-c", code, _GGUF, made], check=True, stderr=subprocess.DEVNULL)
            made.rename(target)
    return target


def _rounds(engines: dict[str, Engine], cases: list[Case], num_rounds: int) -> dict[tuple[str, str], list[Any]]:
    """Answers by engine and case; the first round only warms up."""
    seen: dict[tuple[str, str], list[Any]] = {}
    for number in range(num_rounds + 1):
        for case in cases:
            for name, engine in engines.items():
                answer = engine.measure(case, number)
                if number:
                    seen.setdefault((name, case.name), []).append(answer)
    return seen


def _figures(seen: dict[tuple[str, str], list[Any]]) -> dict[str, float]:
    figures = {}
    for name in sorted({name for name, _ in seen}):
        prefill_s = min(one["first_s"] for one in seen[name, "prefill"])
        figures[f"{name}_prefill_tokens_per_s"] = PROMPT_TOKENS / prefill_s
        cpu_s = min(one["first_cpu_s"] for one in seen[name, "prefill"])
        figures[f"{name}_prefill_tokens_per_cpu_s"] = PROMPT_TOKENS / cpu_s
        for case in ("decode_1", "decode_8"):
            answers = seen[name, case]
            figures[f"{name}_{case}_tokens_per_s"] = 1 / min(one["later_s_per_token"] for one in answers)
            figures[f"{name}_{case}_tokens_per_cpu_s"] = 1 / min(one["later_cpu_s_per_token"] for one in answers)
        figures[f"{name}_peak_mb"] = max(one["peak_mb"] for one in seen[name, "decode_8"])
    for peer in ("genai", "llama_cpp", "openvino"):
        if f"{peer}_peak_mb" in figures:
            for part in ("prefill", "decode_1", "decode_8"):
                ours, theirs = (figures[f"{name}_{part}_tokens_per_s"] for name in ("ours", peer))
                figures[f"ratio_vs_{peer}_{part}"] = ours / theirs
                ours, theirs = (figures[f"{name}_{part}_tokens_per_cpu_s"] for name in ("ours", peer))
                figures[f"cpu_ratio_vs_{peer}_{part}"] = ours / theirs
            figures[f"ratio_vs_{peer}_memory"] = figures["ours_peak_mb"] / figures[f"{peer}_peak_mb"]
    return figures


def _say(line: str) -> None:
    print(line, file=sys.stderr)
