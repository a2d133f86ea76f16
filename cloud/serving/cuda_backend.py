"""The GPU's form of weights; steps themselves are `cuda_step`'s."""

from __future__ import annotations

from cloud.serving.backend import Tensor
from cloud.serving.torch_backend import TorchBackend
from kernels import quant


class CudaBackend(TorchBackend):
    """As `TorchBackend`, but rounds weights to the form of `kernels.quant`, a scale per group of columns."""

    def _pack(self, weight: Tensor, bits: int) -> Tensor:
        return quant.quantise(weight, bits, quant.largest_group(weight.shape[1]))
