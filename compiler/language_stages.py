"""The stages of language models. Each function names all that decides its result and imports its tools when it builds.

import (GGUF) -> build for ONNX Runtime GenAI; source logits; measure; golden. The context length is no part of the
build: it is written into the configuration when the artefact is put together.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from compiler.cache import Built, Stage
from compiler.processor import tensor_kernels
from compiler.progress import Report
from compiler.workshop import Workshop
from wire.errors import GateFailedError

MODEL = "model"
GOLDEN = "golden.json"
LAYERS = "layers.json"
CONFIG = "genai_config.json"
_PROJECTIONS = {"attention": ("/attn/",), "down": ("/down_proj/",), "gate-up": ("/gate_", "/up_proj/")}
_IMPORT_TOOLS = ("gguf", "numpy", "safetensors", "tokenizers", "torch")
_MEASURE_TOOLS = ("numpy", "onnx", "onnxruntime", "onnxruntime-genai", "tokenizers")
_BUILD_TOOLS = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "torch", "transformers")


def import_gguf(shop: Workshop, source: Path, source_digest: str, report: Report) -> Built:
    """The GGUF file as a Hugging Face style folder."""

    def build(to: Path) -> None:
        from compiler import gguf_import

        gguf_import.import_gguf(source, to / MODEL, lambda share, what: report("import", 0.02 + 0.1 * share, what))

    stage = Stage("import", {"source": source_digest}, _IMPORT_TOOLS, build, version=2)
    return shop.run(stage, "reading the GGUF file")


def build_genai(
    shop: Workshop, source: Path, fingerprint: str, precision: str, provider: str, options: Mapping[str, object]
) -> Built:
    """The model for ONNX Runtime GenAI; `options` are the builder's own."""
    decided = {"model": fingerprint, "precision": precision, "provider": provider, "options": dict(options)}

    def build(to: Path) -> None:
        from compiler import language_model

        language_model.build_genai(source, to / MODEL, precision, provider, options)

    return shop.run(Stage("genai", decided, _BUILD_TOOLS, build), f"building {precision} weights for {provider}")


def raise_bits(shop: Workshop, four: Built, eight: Built, projections: Sequence[str]) -> Built:
    """The 4-bit model with the named projections of every block as in the 8-bit one."""
    words = tuple(word for projection in projections for word in _PROJECTIONS[projection])
    layers = [layer for layer in four_bit_layers(shop, four) if any(word in layer for word in words)]
    return raise_layers(shop, four, eight, layers)


def four_bit_layers(shop: Workshop, four: Built) -> list[str]:
    """Names of the layers whose weights have 4 bits, in graph order."""

    def build(to: Path) -> None:
        from compiler import mixed_bits

        bits = mixed_bits.layers_by_bits(four.path(MODEL))
        (to / LAYERS).write_text(json.dumps([layer for layer, width in bits.items() if width == 4]))

    stage = Stage("layers", {"graph": four.files[f"{MODEL}/model.onnx"]}, ("onnx",), build)
    return list(shop.run(stage, "reading the layers").read_json(LAYERS))


def raise_layers(shop: Workshop, four: Built, eight: Built, layers: Sequence[str]) -> Built:
    """The 4-bit model with `layers` as in the 8-bit one."""
    decided = {"four": four.digest, "eight": eight.digest, "layers": sorted(layers)}

    def build(to: Path) -> None:
        from compiler import mixed_bits

        mixed_bits.raise_to_eight_bits(four.path(MODEL), eight.path(MODEL), layers, to / MODEL)

    return shop.run(Stage("mix", decided, ("onnx",), build), f"8 bits for {len(layers)} layers")


def source_logits(shop: Workshop, source: Path, fingerprint: str, num_tokens: int) -> Built:
    """What the source model thinks of held text."""
    decided = {
        "model": fingerprint,
        "tokens": num_tokens,
        "machine": platform.machine(),
        "text": platform.python_version(),
    }

    def build(to: Path) -> None:
        import numpy as np

        from compiler import language_model

        held = language_model.source_logits(source, num_tokens)
        np.save(to / "tokens.npy", held.tokens)
        np.save(to / "logits.npy", held.logits.astype(np.float32))
        held.answers.save(to / "answers.json")

    stage = Stage("source-logits", decided, ("torch", "transformers"), build, version=5)
    return shop.run(stage, "the source reads held text and answers prompts")


def measure(shop: Workshop, model: Built, reference: Built) -> dict[str, float]:
    """Figures of the artefact against the source on held text and the prompt set, on the CPU."""
    decided = {"model": model.digest, "reference": reference.digest, "machine": platform.machine()}

    def build(to: Path) -> None:
        import numpy as np

        from compiler import language_model, metrics, prompt_set, soundness

        tokens = np.load(reference.path("tokens.npy"))
        logits = np.load(reference.path("logits.npy"), mmap_mode="r")
        figures = metrics.language_figures(logits, language_model.artefact_logits(model.path(MODEL), tokens), tokens)
        wanted = prompt_set.Answers.load(reference.path("answers.json"))
        figures |= prompt_set.prompt_figures(wanted, prompt_set.ask_artefact(model.path(MODEL), wanted.prompts))
        figures["broken_numbers"] = soundness.count_broken_numbers(model.path(MODEL) / "model.onnx")
        (to / "figures.json").write_text(json.dumps(figures))

    stage = Stage("measure", decided, _MEASURE_TOOLS, build, version=4)
    built = shop.run(stage, "the artefact reads held text and answers prompts")
    return dict(built.read_json("figures.json"))


def speeds(shop: Workshop, model: Built) -> dict[str, dict[str, float] | str]:
    """What each of the agent's runtimes makes of the artefact on this processor (`runtime_choice.measure_speeds`)."""
    decided = {"model": model.digest, "machine": platform.machine(), "kernels": tensor_kernels()}

    def build(to: Path) -> None:
        from compiler.runtime_choice import measure_speeds

        (to / "speeds.json").write_text(json.dumps(measure_speeds(model.path(MODEL))))

    stage = Stage("speeds", decided, ("onnxruntime", "onnxruntime-genai"), build, version=3, reproducibility="timing")
    return dict(shop.run(stage, "the agent's runtimes decode in turn").read_json("speeds.json"))


def golden(shop: Workshop, model: Built) -> Built:
    """Greedy continuations by the artefact itself."""

    def build(to: Path) -> None:
        from compiler import language_model

        cases = language_model.golden_cases(model.path(MODEL))
        if not all(case["tokens"] for case in cases):
            raise GateFailedError("the artefact answers a prompt with nothing", remedy="check the source model")
        (to / GOLDEN).write_text(json.dumps({"cases": cases}))

    decided = {"model": model.digest, "machine": platform.machine()}
    return shop.run(
        Stage("golden", decided, ("onnxruntime-genai", "tokenizers"), build, version=2), "writing golden continuations"
    )


def limited_config(shop: Workshop, model: Built, context_tokens: int) -> Built:
    """The artefact's configuration with its context cut to `context_tokens`."""
    decided = {"config": model.files[f"{MODEL}/{CONFIG}"], "context": context_tokens}

    def build(to: Path) -> None:
        config = json.loads(model.path(f"{MODEL}/{CONFIG}").read_bytes())
        limit = min(context_tokens, int(config["model"]["context_length"]))
        config["model"]["context_length"] = limit
        config["search"]["max_length"] = limit
        (to / CONFIG).write_text(json.dumps(config, indent=2))

    return shop.run(Stage("config", decided, (), build), "limiting the context")
