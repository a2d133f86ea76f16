"""Programmatic dependent launch: a kernel's first instructions run while the kernel before it still finishes.

Rules: a kernel that takes `OVERLAPS` calls `let_next_start` once, and `wait_for_previous` before it touches anything
another kernel writes; every kernel of a chain waits, so what is before the last one is complete too. Weights may be
read before the wait. Needs a Hopper GPU or later (CUDA programming guide, "Programmatic Dependent Launch"); elsewhere
the options are empty and launches follow each other as ever.
"""

# Triton functions are traced, not typed.
# mypy: disable-error-code="no-untyped-def,attr-defined"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """Block until the kernels launched before this one are complete and their writes visible."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr):
    """Allow the next kernel to be placed on processors that this one leaves free."""
    if OVERLAPS:
        gdc_launch_dependents()


def overlap(x: Tensor) -> dict[str, Any]:
    """Launch options of a kernel that follows these rules, on the device of `x`."""
    return {"OVERLAPS": True, "launch_pdl": True} if x.is_cuda and _is_hopper(x.device) else {"OVERLAPS": False}


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return bool(torch.cuda.get_device_capability(device)[0] >= 9)
