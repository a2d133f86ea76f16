"""The language models to try for one target, smallest first: 4 bits, rungs of 8-bit projections, then a search.

The search keeps single layers at 8 bits, taken from the model's 8-bit twin; `compiler.sensitivity` decides which sets
are tried, and a set is mixed, measured and judged in cached stages. Only 4-bit graphs for the CPU can be mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compiler import language_stages
from compiler.cache import Built
from compiler.compile_job import size_bytes
from compiler.float_search import Found, Judge, Measure, search_layers
from compiler.recipe import LanguageRecipe
from compiler.workshop import Workshop

_NOT_ACCURACY = ("size_ratio",)


class LanguageCandidates:
    """`built` and its mixed variants."""

    def __init__(
        self, shop: Workshop, source: Path, fingerprint: str, language: LanguageRecipe, provider: str, built: Built
    ) -> None:
        self._shop, self._source, self._fingerprint, self._built = shop, source, fingerprint, built
        self._language, self._provider = language, provider
        precision: str = language.precision or "fp32"
        self._label_by_digest = {built.digest: precision}
        self._can_mix = precision == "int4" and provider == "cpu"

    def rungs(self) -> Iterator[Built]:
        """The model itself, then with more and more projections of 8 bits; built when they are asked for."""
        yield self._built
        for rung in filter(None, self._language.eight_bit_rungs if self._can_mix else ()):
            mixed = language_stages.raise_bits(self._shop, self._built, self._eight_bits(), rung)
            self._label_by_digest[mixed.digest] = f"int4, {' and '.join(rung)} int8"
            yield mixed

    def search(self, measure: Measure, judge: Judge) -> Found | None:
        """The fewest bytes whose gates hold, once no rung does; None where nothing can be mixed or nothing holds.

        Costs up to 3 * sqrt(layers) + 10 models.
        """
        if not self._can_mix or not self._language.search:
            return None
        eight, layers = self._eight_bits(), self.layers()

        def mix(kept: Sequence[str]) -> Built:
            if not kept:
                return self._built
            self._shop.cache.touch(self._built, eight)
            mixed = language_stages.raise_layers(self._shop, self._built, eight, kept)
            self._label_by_digest.setdefault(mixed.digest, f"int4, {len(kept)} of {len(layers)} layers int8")
            return mixed

        def size(built: Built) -> int:
            return size_bytes(built.path(language_stages.MODEL))

        found = search_layers(layers, mix, measure, judge, size, _NOT_ACCURACY)
        if found is None:
            return None
        graph = mix(sorted(found.result.kept or ()))  # the cache may have dropped it for later tries
        return replace(found, graph=graph)

    def layers(self) -> list[str]:
        """Names of the layers of 4 bits, in graph order."""
        return language_stages.four_bit_layers(self._shop, self._built)

    def label(self, built: Built) -> str:
        """What a candidate is called in the report."""
        return self._label_by_digest[built.digest]

    def _eight_bits(self) -> Built:
        options = {"algo_config": "k_quant"}
        return language_stages.build_genai(self._shop, self._source, self._fingerprint, "int8", self._provider, options)
