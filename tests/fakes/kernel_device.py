"""Where the kernel tests run: on the GPU when there is one, in Triton's interpreter on the CPU otherwise.

Import this before anything of `kernels`: Triton reads its interpreter switch when a kernel is defined.
"""

from __future__ import annotations

import os

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output whose every element shows if nobody wrote it."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """|got - wanted| / |wanted| in float64; NaN never compares as small."""
    wanted = wanted.double().cpu()
    return float((got.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))
