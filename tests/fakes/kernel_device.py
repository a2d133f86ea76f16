"""Where the kernel tests run: on the GPU when there is one, in Triton's interpreter on the CPU otherwise.

Import this before anything of `kernels`: Triton reads its interpreter switch when a kernel is defined.
"""

from __future__ import annotations

import os
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def _prepare_language_once_per_launch() -> None:
    """Make the interpreter's preparation of `triton.language` happen once per launch and module.

    It repeats it at every call of a device function, which took half the time of these tests. What a launch prepared
    stays until its end, so a second time changes nothing.
    """
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[str] = set()

    def prepare_once(fn: Any) -> Any:
        module = fn.__globals__["__name__"]
        if module in prepared:
            return interpreter._LangPatchScope()
        prepared.add(module)
        return prepare(fn)

    def launch_anew(self: Any, *args: Any, **options: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, launch_anew


if not ON_GPU:
    _prepare_language_once_per_launch()


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output whose every element shows if nobody wrote it."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """|got - wanted| / |wanted| in float64; NaN never compares as small."""
    wanted = wanted.double().cpu()
    return float((got.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))
