"""Language models: built for ONNX Runtime GenAI, run side by side with the source, and judged.

The builder runs offline in a subprocess. It accepts unknown options silently, so what it wrote is inspected: the bits
of the weight kernels must be those that were asked for. Source and artefact see the same held text; the source runs
under transformers in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from compiler.gates import gate, mean_kl, perplexity, top1_agreement
from compiler.recipe import LanguageRecipe
from model_registry.manifest import GateResult
from wire.errors import ForeshoreError, TimedOutError, UnsupportedModelError

BUILD_TIMEOUT_S = 1800.0
WINDOW_TOKENS = 256
_ALGORITHMS = {"int4": ["algo_config=k_quant_mixed"], "int8": [], "fp32": []}
_BITS = {"int4": {4, 8}, "int8": {8}, "fp32": set[int]()}
_PROMPTS = ("What is the capital of France?", "Name three primary colours.", "Write one sentence about the sea.")
_GOLDEN_TOKENS = 16

Array = np.ndarray[Any, Any]


class BuilderError(ForeshoreError):
    """The model builder failed; the message ends with its last lines."""

    code = "builder_failed"


@dataclass(frozen=True)
class Held:
    """Held text as tokens [windows, length] with the source's logits [windows, length, vocabulary] for it."""

    tokens: Array
    logits: Array


def build_genai(source: Path, out: Path, precision: str, context_tokens: int) -> None:
    """Build the Hugging Face folder `source` into the folder `out` for ONNX Runtime GenAI on the CPU."""
    command = [sys.executable, "-m", "compiler.genai_builder", "-i", str(source), "-o", str(out), "-p", precision]
    command += ["-e", "cpu", "-c", str(out.parent / "builder-cache")]
    if _ALGORITHMS[precision]:
        command += ["--extra_options", *_ALGORITHMS[precision]]
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": root}
    log = out.parent / "builder.log"
    try:
        with log.open("wb") as file:
            status = subprocess.run(
                command, env=environment, stdout=file, stderr=file, timeout=BUILD_TIMEOUT_S, check=False
            ).returncode
    except subprocess.TimeoutExpired as error:
        raise TimedOutError(
            f"the model builder ran over {BUILD_TIMEOUT_S:.0f} s", remedy="use a smaller model"
        ) from error
    if status != 0:
        tail = log.read_bytes()[-1500:].decode(errors="replace")
        raise BuilderError(f"the model builder ended with {status}: {tail}", remedy="see the job's log")
    _check_effect(out / "model.onnx", precision)
    _limit_context(out / "genai_config.json", context_tokens)


def _check_effect(model: Path, precision: str) -> None:
    bits = weight_bits(model)
    if set(bits) - _BITS[precision] or (precision == "int4" and 4 not in bits) or (precision == "int8" and not bits):
        raise BuilderError(
            f"asked for {precision}, the builder wrote weight kernels with {sorted(bits) or 'no'} bits",
            remedy="its options changed: pin another onnxruntime-genai",
        )


def weight_bits(model: Path) -> dict[int, int]:
    """How many weight kernels (MatMulNBits) of each width the graph at `model` has."""
    found: dict[int, int] = {}
    for node in onnx.load(str(model), load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
            found[bits] = found.get(bits, 0) + 1
    return found


def _limit_context(path: Path, context_tokens: int) -> None:
    config = json.loads(path.read_text())
    limit = min(context_tokens, int(config["model"]["context_length"]))
    config["model"]["context_length"] = limit
    config["search"]["max_length"] = limit
    path.write_text(json.dumps(config, indent=2))


def source_logits(source: Path, num_tokens: int) -> Held:
    """Held text under the source model in float32. The text is English prose that ships with Python."""
    model, tokenizer = _load_source(source)
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)[:40])
    ids = tokenizer(text, return_tensors="np").input_ids[0]
    windows = max(1, min(num_tokens, len(ids)) // WINDOW_TOKENS)
    length = min(WINDOW_TOKENS, len(ids))
    tokens = ids[: windows * length].reshape(windows, length).astype(np.int64)
    with torch.inference_mode():
        logits = np.concatenate([model(torch.from_numpy(row[None])).logits.float().numpy() for row in tokens])
    return Held(tokens, logits)


def _load_source(source: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # heavy; only where a source is judged

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0][:300]
        raise UnsupportedModelError(
            f"transformers cannot load the model: {reason}", remedy="check config.json"
        ) from error
    return model.eval(), tokenizer


def artefact_logits(folder: Path, tokens: Array) -> Array:
    """Logits [windows, length, vocabulary] of the built model for `tokens`, through plain ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    past = {item.name: empty for item in session.get_inputs() if item.name.startswith("past_key_values")}
    names = {item.name for item in session.get_inputs()}
    rows = []
    for row in tokens:
        feeds = {"input_ids": row[None], "attention_mask": np.ones((1, len(row)), np.int64), **past}
        if "position_ids" in names:
            feeds["position_ids"] = np.arange(len(row), dtype=np.int64)[None]
        rows.append(session.run(["logits"], feeds)[0].astype(np.float32))
    return np.concatenate(rows)


def judge(held: Held, logits: Array, recipe: LanguageRecipe) -> list[GateResult]:
    """Perplexity ratio, divergence and agreement of the greedy choice against the source."""
    source_perplexity = perplexity(held.logits, held.tokens)
    ratio = perplexity(logits, held.tokens) / source_perplexity
    return [
        gate("perplexity_ratio", ratio, "<=", recipe.max_perplexity_ratio),
        gate("kl_nats", mean_kl(held.logits, logits), "<=", recipe.max_kl),
        gate("greedy_agreement", top1_agreement(held.logits, logits), ">=", recipe.min_greedy_agreement),
    ]


def golden_cases(folder: Path) -> list[dict[str, list[int]]]:
    """Greedy continuations by the artefact itself, through the runtime that devices use.

    How near the artefact is to its source is the gates' question; the device asks whether it computes the same as here.
    """
    import onnxruntime_genai as genai  # only where language models are built

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    cases = []
    for prompt in _PROMPTS:
        tokens = [int(token) for token in tokenizer.encode(_as_chat(tokenizer, prompt))]
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(tokens) + _GOLDEN_TOKENS)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        answer = [int(token) for token in generator.get_sequence(0)[len(tokens) :]]
        cases.append({"prompt_tokens": tokens, "tokens": answer})
    return cases


def _as_chat(tokenizer: Any, prompt: str) -> str:
    messages = json.dumps([{"role": "user", "content": prompt}])
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    except RuntimeError:  # a base model without a chat template
        return prompt
