"""How many weights share a scale, where the recipe leaves it open and the quantiser cannot take every number.

ONNX Runtime's k-quant (and its asymmetric round-to-nearest) packs the 4-bit zero points of a whole matrix in one run,
two a byte, while the kernel wants each row to begin with a byte of its own. So every row must have an even number of
blocks; with an odd one the builder fails at the first such layer, after minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wire.errors import InvalidInputError, UnsupportedModelError

DEFAULT = 32
CHOICES = (DEFAULT, 16, 64, 128)  # in order of preference: smaller blocks cost bytes, larger ones accuracy


def fit_blocks(options: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The model builder's 4-bit `options` for the folder `source`, with a block size where the default does not fit.

    Raises `InvalidInputError` for a named size that does not fit and `UnsupportedModelError` where none does.
    """
    if not _packs_zero_points(options):
        return dict(options)
    sizes = inner_sizes(json.loads((source / "config.json").read_bytes()))
    fitting = [block for block in CHOICES if not _odd(sizes, block)]
    named = options.get("block_size")
    odd = _odd(sizes, int(named or DEFAULT))
    if not odd:
        return dict(options)
    name, size = next(iter(odd.items()))
    blocks = f"{name} = {size} is an odd number of blocks of {named or DEFAULT}"
    what = f"{blocks}, which {options['algo_config']} cannot pack"
    if named is not None and fitting:
        raise InvalidInputError(what, remedy=f"language.builder_options.block_size: {fitting[0]}, or leave it out")
    if not fitting:
        raise UnsupportedModelError(what, remedy="language.algorithm: default, or precision: int8")
    return {**options, "block_size": fitting[0]}


def inner_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """How long the rows of a decoder's weight matrices are, by the configuration's name for it."""
    found = {name: config[name] for name in ("hidden_size", "intermediate_size") if isinstance(config.get(name), int)}
    heads, width = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(heads, int) and isinstance(width, int):
        found["num_attention_heads * head_dim"] = heads * width
    return found


def _packs_zero_points(options: Mapping[str, Any]) -> bool:
    algorithm = str(options.get("algo_config", ""))
    return algorithm.startswith("k_quant") or (algorithm.startswith("rtn") and options.get("is_symmetric") is False)


def _odd(sizes: Mapping[str, int], block: int) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if -(-size // block) % 2}
