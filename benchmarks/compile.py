"""The compiler on real models: size, time, accuracy and speed of what it makes, and what sharing stages saves.

Vision: two classifiers trained here with labels (`_trained_digits`), and MobileNetV2 with its ImageNet weights for
every target. Language: SmolLM2-135M, and with the whole run Qwen2.5-Coder-0.5B. Agreement and perplexity are against
the source model on inputs that neither training nor calibration saw. Speeds are one thread, alternating with the fp32
artefact, and only of targets whose arithmetic this processor has: without VNNI that target has accuracy and size alone.

`shared_stage_saving` is 1 - (seconds of the stages built for all targets) / (seconds of the stages that each target
would have built alone), both from the records of one run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Goal
from compiler.cache import BuildCache
from compiler.many import TargetResult, compile_targets
from compiler.processor import tensor_kernels
from compiler.recipe import Recipe, parse_recipe
from compiler.targets import load_target, load_targets

MODELS = Path(__file__).resolve().parent.parent / ".cache" / "models"
VISION_TARGETS = "cpu-reference,cpu-x86,cpu-x86-vnni,cpu-arm,cuda,jetson-orin,rtx"
SPEED_RUNS = 60
NUM_DATA = 256
DECODE_TOKENS = 48
DECODE_RUNS = 5
MAX_PERPLEXITY_RATIO = 1.05
SEARCHED_MAX_KL = 0.12
GOALS = (
    Goal("residual_agreement_cpu-x86-vnni", 0.995, ">="),
    Goal("depthwise_agreement_cpu-x86-vnni", 0.995, ">="),
    Goal("residual_speedup_vs_fp32_cpu-x86-vnni", 3.0, ">="),
    Goal("depthwise_speedup_vs_fp32_cpu-x86-vnni", 3.0, ">="),
    Goal("mobilenet_shared_stage_saving", 0.5, ">="),
    Goal("mobilenet_num_targets", 6, ">="),
    Goal("smollm2_shared_stage_saving", 0.5, ">="),
    Goal("smollm2_num_targets", 6, ">="),
    Goal("warm_build_ms", 300, "<="),
    Goal("smollm2_speedup_vs_fp32", 3.0, ">="),
    Goal("smollm2_mixed_ppl_ratio", MAX_PERPLEXITY_RATIO, "<="),
    Goal("qwen_mixed_speedup_vs_fp32", 3.0, ">="),
    Goal("qwen_mixed_ppl_ratio", MAX_PERPLEXITY_RATIO, "<="),
)

Array = np.ndarray[Any, Any]


def run(quick: bool) -> dict[str, float]:
    """All figures; `quick` trains less, compiles SmolLM2 for two kinds of target and leaves Qwen out."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-compile-") as folder:
        root = Path(folder)
        started = time.monotonic()
        figures |= trained_networks(root, num_epochs=3 if quick else 12)
        print(f"  trained networks: {time.monotonic() - started:.0f} s", flush=True)
        figures |= mobilenet(root)
        print(f"  MobileNetV2: {time.monotonic() - started:.0f} s", flush=True)
        targets = "cpu-reference,cpu-x86,cpu-arm,cpu-x86-vnni,jetson-orin,rtx" if quick else "all"
        figures |= language(root, "smollm2", MODELS / "smollm2-135m-instruct", targets, quick)
        if not quick and (MODELS / "qwen2.5-coder-0.5b-instruct").is_dir():
            figures |= language(root, "qwen", MODELS / "qwen2.5-coder-0.5b-instruct", "cpu-reference,cpu-x86", quick)
    return figures


# vision


def trained_networks(root: Path, num_epochs: int) -> dict[str, float]:
    """Accuracy with labels, agreement, size and speed of both networks for the targets of `VISION_TARGETS`."""
    from benchmarks import _trained_digits as trained

    digits = trained.load()
    figures: dict[str, float] = {}
    for name, make in (("residual", trained.residual_network), ("depthwise", trained.depthwise_network)):
        source, data = root / f"{name}.onnx", root / f"{name}.npz"
        trained.export(trained.train(make(), digits, num_epochs), source)
        calibration = digits.train[:NUM_DATA].numpy()
        np.savez(data, image=calibration)
        recipe = parse_recipe({"tensor": {"min_top1_agreement": 0.95, "float_rungs": [0, 1, 3]}})
        cache = BuildCache(root / f"{name}-cache")
        results = compile_targets(source, load_targets(VISION_TARGETS), recipe, root / name, cache, _say, data=data)
        figures |= {f"{name}_{key}": value for key, value in _vision_figures(results, source, digits).items()}
    return figures


def _vision_figures(results: Sequence[TargetResult], source: Path, digits: Any) -> dict[str, float]:
    """Figures by target; labels are those of images that neither training nor calibration saw."""
    images, labels = digits.held_out, digits.held_out_labels
    wanted = _answers(source, images, "kernels")
    figures = {"top1_fp32": float((wanted.argmax(1) == labels).mean())}
    reference = next(
        r.artefact.folder / "model.onnx" for r in results if r.artefact and r.target.name == "cpu-reference"
    )
    for result in results:
        if result.artefact is None:
            print(f"  {result.target.name}: {result.error}", flush=True)
            continue
        name, model = result.target.name, result.artefact.folder / "model.onnx"
        has_kernels = result.target.tensor_kernels == tensor_kernels()
        found = _answers(model, images, "kernels" if has_kernels else "definition")
        figures |= {
            f"size_ratio_{name}": model.stat().st_size / source.stat().st_size,
            f"build_s_{name}": sum(stage.seconds for stage in result.artefact.stages),
            f"agreement_{name}": float((found.argmax(1) == wanted.argmax(1)).mean()),
            f"top1_{name}": float((found.argmax(1) == labels).mean()),
        }
        if has_kernels and name != "cpu-reference":
            figures[f"speedup_vs_fp32_{name}"] = vision_speedup(reference, model, images[:1])
    return figures


def _answers(path: Path, images: Array, arithmetic: Any) -> Array:
    from compiler.tensor_model import run_batches

    return next(iter(run_batches(path, {"image": images}, arithmetic).values()))


def vision_speedup(slow: Path, fast: Path, images: Array) -> float:
    """Median latency of `slow` over that of `fast`: one thread, alternating runs."""
    import onnxruntime

    def open_one(path: Path) -> Callable[[], float]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {session.get_inputs()[0].name: images}

        def call() -> float:
            started = time.perf_counter()
            session.run(None, feeds)
            return time.perf_counter() - started

        return call

    return _ratio(open_one(slow), open_one(fast), SPEED_RUNS)


def _ratio(slow: Callable[[], float], fast: Callable[[], float], num_runs: int) -> float:
    """The ratio of median seconds of two calls that alternate; the first of each is a warm-up."""
    times = [(slow(), fast()) for _ in range(num_runs + 1)][1:]
    return statistics.median(one for one, _ in times) / statistics.median(other for _, other in times)


def mobilenet(root: Path) -> dict[str, float]:
    """MobileNetV2 for every target in one run, what sharing saved, and a warm build."""
    source, cache = MODELS / "mobilenet_v2.onnx", BuildCache(root / "mobilenet-cache")
    results = compile_targets(source, load_targets("all"), Recipe(), root / "mobilenet", cache, _say)
    figures = _sharing(results)
    for result in results:
        if result.artefact is not None:
            figures[f"size_ratio_{result.target.name}"] = _gate(result, "size_ratio")
            figures[f"agreement_{result.target.name}"] = _gate(result, "top1_agreement")
    reference = root / "mobilenet" / "cpu-reference" / "model.onnx"
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    for name in ("cpu-x86", "cpu-x86-vnni"):
        if load_target(name).tensor_kernels == tensor_kernels():
            fast = root / "mobilenet" / name / "model.onnx"
            figures[f"speedup_vs_fp32_{name}"] = vision_speedup(reference, fast, images)
    named = {f"mobilenet_{key}": value for key, value in figures.items()}
    return named | {"warm_build_ms": _warm_ms(source, root / "mobilenet-warm", cache)}


def _warm_ms(source: Path, out: Path, cache: BuildCache) -> float:
    """Median milliseconds of a build of one target that was built before, hashing the source and writing included."""
    taken = []
    for number in range(9):
        started = time.perf_counter()
        compile_targets(source, [load_target("cpu-x86")], Recipe(), out / str(number), cache, _say)
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def _sharing(results: Sequence[TargetResult]) -> dict[str, float]:
    """How many targets were made and the share of stage seconds that they saved each other."""
    made = [result.artefact for result in results if result.artefact is not None]
    seconds_by_key = {stage.key: stage.seconds for artefact in made for stage in artefact.stages}
    alone = sum(sum({stage.key: stage.seconds for stage in artefact.stages}.values()) for artefact in made)
    together = sum(seconds_by_key.values())
    for result in results:
        if result.artefact is None:
            print(f"  {result.target.name}: {result.error}", flush=True)
    if not made:
        return {"num_targets": 0}
    return {
        "num_targets": len(made),
        "together_s": together,
        "one_by_one_s": alone,
        "shared_stage_saving": 1 - together / alone,
    }


def _gate(result: TargetResult, name: str) -> float:
    assert result.artefact is not None
    return next(gate.value for gate in result.artefact.manifest.gates if gate.name == name)


# language models


def language(root: Path, name: str, source: Path, targets: str, quick: bool) -> dict[str, float]:
    """Sharing over `targets`; the recipe's ladder from 4 bits to mixed ones until perplexity holds, with its price."""
    cache = BuildCache(root / f"{name}-cache")
    gate_tokens = 256 if quick else 1024

    def compile_with(limit: float, chosen: str, folder: str) -> list[TargetResult]:
        recipe = {"gate_tokens": gate_tokens, "max_perplexity_ratio": limit}
        return compile_targets(
            source, load_targets(chosen), parse_recipe({"language": recipe}), root / folder, cache, _say
        )

    figures = _sharing(compile_with(1.25, targets, name))
    if not figures["num_targets"]:
        return {f"{name}_num_targets": 0}
    reference = root / name / "cpu-reference"
    for key, limit in (("", 1.25), ("mixed_", MAX_PERPLEXITY_RATIO)):
        result = compile_with(limit, "cpu-x86", f"{name}-{limit}")[0]
        if result.artefact is None:
            print(f"  {name} with perplexity <= {limit}: {result.error}", flush=True)
            continue
        figures |= {
            f"{key}ppl_ratio": _gate(result, "perplexity_ratio"),
            f"{key}agreement": _gate(result, "greedy_agreement"),
            f"{key}size_ratio": _gate(result, "size_ratio"),
            f"{key}build_s": sum(stage.seconds for stage in result.artefact.stages),
            f"{key}speedup_vs_fp32": _decode_speedup(reference, result.artefact.folder),
        }
        figures |= {f"{key}{name}": value for name, value in _runtime_rates(result).items()}
    if not quick:
        figures |= _searched(source, root / f"{name}-searched", cache)
    return {f"{name}_{key}": value for key, value in figures.items()}


def _runtime_rates(result: TargetResult) -> dict[str, float]:
    """What the compiler measured of each runtime when it chose one; nothing where a rule chose."""
    choice = result.artefact.manifest.runtime_choice if result.artefact else None
    options = (choice.chosen, *choice.rejected) if choice else ()
    return {f"{option.runtime}_{name}": value for option in options for name, value in option.figures.items()}


def _searched(source: Path, out: Path, cache: BuildCache) -> dict[str, float]:
    """The price of holding `SEARCHED_MAX_KL`: by the ladder's rungs alone, and by a search over single layers."""
    figures: dict[str, float] = {}
    for key, choice in (("ladder", {"search": False}), ("searched", {"eight_bit_rungs": []})):
        limits = {"max_kl": SEARCHED_MAX_KL, "gate_tokens": 512}
        recipe = parse_recipe({"language": limits | choice})
        started = time.monotonic()
        result = compile_targets(source, load_targets("cpu-x86"), recipe, out / key, cache, _say)[0]
        if result.artefact is None:
            print(f"  {key} with divergence <= {SEARCHED_MAX_KL}: {result.error}", flush=True)
            continue
        print(f"  {key}: {'; '.join(result.artefact.notes)}", flush=True)
        figures |= {
            f"{key}_size_bytes": float(result.artefact.manifest.size_bytes),
            f"{key}_kl": _gate(result, "kl_nats"),
            f"{key}_ppl_ratio": _gate(result, "perplexity_ratio"),
            f"{key}_num_tried": float(len(result.artefact.tried)),
            f"{key}_s": time.monotonic() - started,
        }
    return figures


def _decode_speedup(slow: Path, fast: Path) -> float:
    """Greedy decoding after a prompt of 32 tokens on all threads, alternating: the ratio of median times."""
    return _ratio(_decoder(slow), _decoder(fast), DECODE_RUNS)


def _decoder(folder: Path) -> Callable[[], float]:
    """Returns the seconds that decoding took, so that the prompt does not count."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))

    def decode() -> float:
        parameters = genai.GeneratorParams(model)
        length = 33 + DECODE_TOKENS
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.arange(100, 132, dtype=np.int32)[None])
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(DECODE_TOKENS):
            generator.generate_next_token()
        return time.perf_counter() - started

    return decode


def _say(target: str, stage: str, share: float, message: str) -> None:
    """Progress is of no interest to a benchmark."""
