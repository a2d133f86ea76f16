"""Weight-only quantised products on a CPU: 8 or 4 bits, in the packed forms of torch's kernels.

8 bits: one float scale per output row. 4 bits: one per group of input columns, symmetric around 8. Activations stay
bfloat16, so a token costs half or a quarter of the memory traffic. Kernels of torch that the public API does not name
yet; they exist since torch 2.5 and tests hold them against plain products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cloud.serving.wide_linear import wide_linear
from wire.errors import UnsupportedModelError

Tensor = Any
BITS = (4, 8)
MAX_GROUP = 64
MANY_ROWS = 16  # from here on 8-bit weights are widened tile by tile: the packed kernel's time grows with the rows


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in]: int8 rows and scales [out], or torch's 4-bit form and scales [in / group, out, 2]."""

    data: Tensor
    scales: Tensor
    bits: int
    group_size: int  # input columns that share a scale
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return int(self.data.nbytes + self.scales.nbytes)


def pack(weight: Tensor, bits: int) -> PackedWeight:
    """Round a weight [out, in] to the nearest steps; raises `UnsupportedModelError` for shapes no kernel takes."""
    out, columns = weight.shape
    if bits == 8:
        scales = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
        data = (weight.float() / scales[:, None]).round().to(torch.int8)
        return PackedWeight(data, scales.to(torch.bfloat16), 8, columns, (out, columns))
    group = next((size for size in (MAX_GROUP, 32) if columns % size == 0), 0)
    if not group or out % 16:
        raise UnsupportedModelError(
            f"a weight of {out} x {columns} has no 4-bit form: rows must come in 16s, columns in 32s",
            remedy="use --weight-bits 8 or 16",
        )
    groups = weight.float().view(out, -1, group)
    steps = (groups.abs().amax(dim=-1).clamp_min(1e-12) / 7).to(torch.bfloat16)
    values = (groups / steps.float()[..., None]).round().clamp(-7, 7).view(out, columns).to(torch.int32) + 8
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    scales = torch.stack((steps.t(), torch.zeros_like(steps.t())), dim=-1).contiguous()
    return PackedWeight(data, scales, 4, group, (out, columns))


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x bfloat16 [rows, in] times a packed weight, plus bias: [rows, out]."""
    if weight.bits == 4:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.data, weight.group_size, weight.scales)
    elif x.shape[0] >= MANY_ROWS:
        return wide_linear(x, weight.data, bias, weight.scales.float())
    else:
        out = torch._weight_int8pack_mm(x.contiguous(), weight.data, weight.scales)
    return out if bias is None else out.add_(bias)
