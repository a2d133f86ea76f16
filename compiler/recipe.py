"""A recipe: how one model is compiled, and what it must measure up to. Unknown keys are refused.

What a recipe leaves open is filled from the target, so that the filled recipe names every decision; its digest is part
of the manifest, and each stage's key holds the part that it reads. Limits are judged against the source model, never
against labels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compiler.targets import FIRST_FP8_CAPABILITY, LanguagePrecision, Target, TensorPrecision
from model_registry.manifest import canonical_bytes, sha256
from wire.errors import InvalidInputError

Projection = Literal["attention", "down", "gate-up"]
Share = Annotated[float, Field(ge=0, le=1)]
TensorRuntime = Literal["auto", "onnxruntime", "tensorrt-rtx", "tensorrt"]
LanguageRuntime = Literal["auto", "onnxruntime", "onnxruntime-genai"]
"""What runs the artefact on a device; "auto" is decided by `compiler.runtime_choice`."""

BuilderOption = Literal["accuracy_level", "block_size", "fuse_qkv", "is_symmetric", "shared_embeddings"]
"""Options of the model builder that shape the graph. It accepts any word, also ones that load foreign code; so only
these are passed on, and what each changed is measured (`compiler.options`)."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorRecipe(_Strict):
    """For classifiers and other tensor models.

    `float_rungs` are tried in order until the gates hold: how many of the first layers stay float. Early layers of
    depthwise networks lose most by 8 bits and cost least as floats. If none holds, `search` looks for the layers that
    must stay float, which takes up to 3 * sqrt(layers) + 10 more tries.
    """

    precision: TensorPrecision | None = None
    quantiser: Literal["onnxruntime", "modelopt"] | None = None
    runtime: TensorRuntime = "auto"
    calibration_crops: Annotated[int, Field(ge=8, le=1024)] = 96
    gate_crops: Annotated[int, Field(ge=8, le=1024)] = 96
    float_rungs: Annotated[list[Annotated[int, Field(ge=0, le=1000)]], Field(min_length=1, max_length=8)] = [
        0,
        5,
        12,
        24,
    ]
    search: bool = True
    min_top1_agreement: Share = 0.85
    min_worst_slice_agreement: Share = 0.5  # of the source's classes with at least 8 cases
    min_cosine: Share = 0.98
    min_integer_layer_share: Share = 0.6  # of the layers with weights, where numbers have 8 bits
    max_relative_error: Annotated[float, Field(ge=0, le=100)] = 0.3
    max_top1_drop: Share = 0.02  # only where the data have labels
    golden_min_top1_agreement: Share = 0.65
    golden_min_cosine: Share = 0.85


class LanguageRecipe(_Strict):
    """For language models. `algorithm` is how 4-bit weights are chosen; the mixed ones keep a few layers at 8 bits.

    `eight_bit_rungs` are tried in order until the gates hold: which projections have 8 bits in every block besides. If
    none holds, `search` looks for the few layers that must, which takes up to 3 * sqrt(layers) + 10 more tries.
    """

    precision: LanguagePrecision | None = None
    runtime: LanguageRuntime = "auto"
    algorithm: Literal["default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed"] = "k_quant_mixed"
    builder_options: Annotated[dict[BuilderOption, bool | int], Field(max_length=8)] = {}
    eight_bit_rungs: Annotated[list[Annotated[list[Projection], Field(max_length=3)]], Field(max_length=8)] = [
        [],
        ["attention"],
        ["attention", "down"],
        ["attention", "down", "gate-up"],
    ]
    search: bool = True
    context_tokens: Annotated[int, Field(ge=128, le=131072)] = 2048
    gate_tokens: Annotated[int, Field(ge=128, le=65536)] = 1024
    max_perplexity_ratio: Annotated[float, Field(ge=1, le=100)] = 1.25
    max_kl: Annotated[float, Field(ge=0, le=100)] = 0.25
    max_worst_slice_kl: Annotated[float, Field(ge=0, le=100)] = 0.5  # of the windows of held text
    min_greedy_agreement: Share = 0.7
    min_exact_match: Share = 0.3  # of the prompt set
    golden_min_token_agreement: Share = 0.5


class Recipe(_Strict):
    """Everything about a compile that a publisher may choose."""

    tensor: TensorRecipe = TensorRecipe()
    language: LanguageRecipe = LanguageRecipe()
    max_size_ratio: Annotated[float, Field(gt=0, le=10)] = 1.5  # of the source's size

    def filled(self, target: Target) -> Recipe:
        """The recipe with what `target` decides. Raises `InvalidInputError` for what its devices cannot do."""
        tensor = {
            "precision": self.tensor.precision or target.tensor.precision,
            "quantiser": self.tensor.quantiser or target.tensor.quantiser,
        }
        language = {"precision": self.language.precision or target.language.precision}
        if tensor["precision"] == "fp8":
            _require_fp8(target)
        _require_runtimes(self, target)
        return self.model_copy(
            update={
                "tensor": self.tensor.model_copy(update=tensor),
                "language": self.language.model_copy(update=language),
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return sha256(canonical_bytes(self.model_dump(mode="json")))


def _require_fp8(target: Target) -> None:
    capabilities = target.engine.compute_capabilities if target.engine else []
    if not capabilities or min(map(float, capabilities)) < FIRST_FP8_CAPABILITY:
        what = f"compute capability {', '.join(capabilities)}" if capabilities else "no TensorRT engine"
        raise InvalidInputError(
            f"fp8 needs compute capability {FIRST_FP8_CAPABILITY}; target {target.name!r} has {what}",
            remedy="choose int8, fp16 or another target",
        )


def _require_runtimes(recipe: Recipe, target: Target) -> None:
    engine = target.engine.builder if target.engine else None
    if recipe.tensor.runtime not in ("auto", "onnxruntime", engine):
        raise InvalidInputError(
            f"target {target.name!r} has no {recipe.tensor.runtime} engine",
            remedy=f"choose auto, onnxruntime{f' or {engine}' if engine else ''}, or another target",
        )
    if recipe.language.runtime == "onnxruntime" and target.language.provider != "cpu":
        raise InvalidInputError(
            f"graphs for {target.language.provider} are run by onnxruntime-genai alone, not by onnxruntime",
            remedy="choose auto or onnxruntime-genai, or another target",
        )


def parse_recipe(document: Any) -> Recipe:
    """Read a recipe from plain data; an unknown key or a value out of range raises `InvalidInputError`."""
    try:
        return Recipe.model_validate(document or {})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "document"
        raise InvalidInputError(f"recipe: {where}: {problem['msg']}", remedy="see docs/compiler.md") from error
