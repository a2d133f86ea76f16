"""Language models: built for ONNX Runtime GenAI, run side by side with the source, and judged.

The builder runs offline in a subprocess. It accepts unknown options silently, so what it wrote is inspected: the bits
of the weight kernels must be those that were asked for. Source and artefact see the same held text; the source runs
under transformers in float32.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from compiler.prompt_set import Answers, ask_source
from compiler.tools import ToolCrashedError, run_tool
from model_registry.chat_tokenizer import ChatTokenizer
from wire.errors import ForeshoreError, UnsupportedModelError

WINDOW_TOKENS = 256
_BITS = {"int4": {4, 8}, "int8": {8}, "fp16": set[int](), "fp32": set[int]()}
_PROMPTS = ("What is the capital of France?", "Name three primary colours.", "Write one sentence about the sea.")
_GOLDEN_TOKENS = 16

Array = np.ndarray[Any, Any]


class BuilderError(ForeshoreError):
    """The model builder failed; the message ends with its last lines."""

    code = "builder_failed"


@dataclass(frozen=True)
class Held:
    """Held text as tokens [windows, length], the source's logits [windows, length, vocabulary], its answers."""

    tokens: Array
    logits: Array
    answers: Answers


def build_genai(
    source: Path, out: Path, precision: str, provider: str = "cpu", options: Mapping[str, Any] = {}
) -> None:
    """Build the Hugging Face folder `source` into the folder `out` for ONNX Runtime GenAI.

    `options` are the builder's own (`algo_config`, `block_size`, ...). What they changed is for the caller to measure.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".builder-") as folder:
        log = Path(folder, "builder.log")
        arguments = [
            "-i",
            str(source),
            "-o",
            str(out),
            "-p",
            precision,
            "-e",
            provider,
            "-c",
            str(Path(folder, "cache")),
        ]
        if options:
            arguments += ["--extra_options", *(f"{key}={_word(value)}" for key, value in sorted(options.items()))]
        try:
            run_tool("compiler.genai_builder:build", {"arguments": arguments}, log=log)
        except ToolCrashedError as error:
            raise BuilderError(f"the model builder failed: {error.message}", remedy="see the job's log") from error
    _check_effect(out / "model.onnx", precision)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    return Held(tokens, logits, ask_source(model, tokenizer))


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
    """Logits [windows, length, vocabulary] of the built model for `tokens`, through plain ONNX Runtime.

    Each window is read in two runs: the second half sees the first through the KV cache alone, as decoding does.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise BuilderError(
            f"ONNX Runtime refuses the graph that the builder wrote: {reason}", remedy="choose other builder options"
        ) from error
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    past = {
        item.name: np.zeros(shape, np.float16 if "float16" in item.type else np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past_key_values")
    }
    names = {item.name for item in session.get_inputs()}
    rows = [_read_in_two(session, row, past, has_positions="position_ids" in names) for row in tokens]
    return np.concatenate(rows)


def _read_in_two(session: Any, row: Array, past: Mapping[str, Array], *, has_positions: bool) -> Array:
    outputs = [output.name for output in session.get_outputs()]
    pieces, start = [], 0
    for end in dict.fromkeys((max(1, len(row) // 2), len(row))):
        feeds = {"input_ids": row[None, start:end], "attention_mask": np.ones((1, end), np.int64), **past}
        if has_positions:
            feeds["position_ids"] = np.arange(start, end, dtype=np.int64)[None]
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        pieces.append(found["logits"].astype(np.float32))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        start = end
    return np.concatenate(pieces, axis=1)


def golden_cases(folder: Path) -> list[dict[str, list[int]]]:
    """Greedy continuations by the artefact itself, through the runtime that devices use.

    How near the artefact is to its source is the gates' question; the device asks whether it computes the same as here.
    """
    import onnxruntime_genai as genai  # only where language models are built

    config = genai.Config(str(folder))
    config.clear_providers()  # a graph for a GPU is asked on the CPU, too
    model = genai.Model(config)
    cases = []
    for tokens in golden_prompts(ChatTokenizer(folder)):
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(tokens) + _GOLDEN_TOKENS)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        answer = [int(token) for token in generator.get_sequence(0)[len(tokens) :]]
        cases.append({"prompt_tokens": tokens, "tokens": answer})
    return cases


def golden_prompts(tokenizer: ChatTokenizer) -> list[list[int]]:
    """Token ids of the golden prompts, cut as a device cuts them; as plain text for a model without a chat template."""
    if not tokenizer.has_chat_template:
        return [tokenizer.encode(prompt) for prompt in _PROMPTS]
    return [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in _PROMPTS]
