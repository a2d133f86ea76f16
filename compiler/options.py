"""What each option of a recipe did: proven by the artefact, a limit of a gate, or nothing, which is then said.

Precisions are proven by inspection of the graph, lengths and limits by the configuration and gates that they end up
in. An option of the model builder is proven by comparison: the model is built without it as well (a cached stage), and
an option without which the same bytes come out is reported as a no-op. That also catches words that a newer builder
accepts and ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.block_size import fit_blocks
from compiler.cache import Built
from compiler.recipe import LanguageRecipe, Recipe
from compiler.workshop import Workshop

_FOR_8_BITS = ("calibration_crops", "float_rungs", "quantiser", "search")


def builder_options(recipe: LanguageRecipe) -> dict[str, Any]:
    """The model builder's options that a recipe comes to. Weights of 16 and 32 bits have none."""
    if recipe.precision not in ("int4", "int8"):
        return {}
    algorithm = (
        {"algo_config": recipe.algorithm} if recipe.precision == "int4" and recipe.algorithm != "default" else {}
    )
    return algorithm | {str(name): value for name, value in recipe.builder_options.items()}


def tensor_notes(recipe: Recipe, precision: str) -> tuple[str, ...]:
    """Options that the recipe sets and that did nothing for this tensor model."""
    notes = [f"language.{name}: no effect, this is a tensor model" for name in _set(recipe.language)]
    if precision not in ("int8", "fp8"):
        notes += [f"tensor.{name}: no effect on {precision}" for name in _set(recipe.tensor) if name in _FOR_8_BITS]
    if recipe.tensor.quantiser == "modelopt" or precision == "fp8":
        notes += [
            f"tensor.{name}: no effect with ModelOpt"
            for name in _set(recipe.tensor)
            if name in ("float_rungs", "search")
        ]
    return tuple(notes)


def language_notes(
    recipe: Recipe, shop: Workshop, source: Path, fingerprint: str, precision: str, provider: str, built: Built
) -> tuple[str, ...]:
    """Options that the recipe sets and that did nothing here; those of the builder are found by building without."""
    from compiler import language_stages

    notes = [f"tensor.{name}: no effect, this is a language model" for name in _set(recipe.tensor)]
    language = recipe.language
    is_small = precision in ("int4", "int8")
    for name in ("algorithm", "eight_bit_rungs"):
        if name in language.model_fields_set and precision != "int4":
            notes.append(f"language.{name}: no effect on {precision}")
    if "search" in _set(language) and (precision != "int4" or provider != "cpu"):
        notes.append(f"language.search: no effect on {precision} for {provider}")
    if "eight_bit_rungs" in language.model_fields_set and provider != "cpu":
        notes.append(f"language.eight_bit_rungs: no effect on a graph for {provider}")
    for name in language.builder_options:
        if not is_small:
            notes.append(f"language.builder_options.{name}: no effect on {precision}")
            continue
        others: Mapping[Any, Any] = {key: value for key, value in language.builder_options.items() if key != name}
        asked = builder_options(language.model_copy(update={"precision": precision, "builder_options": others}))
        options = fit_blocks(asked, source)
        without = language_stages.build_genai(shop, source, fingerprint, precision, provider, options)
        if without.files == built.files:
            notes.append(f"language.builder_options.{name}: no effect, the same bytes come out without it")
    return tuple(notes)


def _set(part: Any) -> list[str]:
    """Names of options that a recipe states and that are not the default."""
    fresh = type(part)()
    return sorted(name for name in part.model_fields_set if getattr(part, name) != getattr(fresh, name))
