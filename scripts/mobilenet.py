"""MobileNetV2 (Sandler et al., 2018) with the parameter names of the published ImageNet weights.

Only for the sample model: the product takes ONNX, never a pickled state dict.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

# expansion, output channels, number of blocks, stride of the first block: table 2 of the paper
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _unit(num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(num_in, num_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(num_out), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; the input is added where shapes allow."""

    def __init__(self, num_in: int, num_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = num_in * expansion
        self.is_residual = stride == 1 and num_in == num_out
        layers: list[nn.Module] = [] if expansion == 1 else [_unit(num_in, hidden, 1)]
        layers += [_unit(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, num_out, 1, bias=False)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(num_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Images [N, 3, 224, 224], normalised, to logits [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [_unit(3, 32, 3, 2)]
        channels = 32
        for expansion, num_out, num_blocks, stride in _STAGES:
            for block in range(num_blocks):
                features.append(InvertedResidual(channels, num_out, stride if block == 0 else 1, expansion))
                channels = num_out
        self.features = nn.Sequential(*features, _unit(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def load_mobilenet(path: Path) -> MobileNetV2:
    """The network with the weights at `path`; nothing in the file is executed (`weights_only`)."""
    network = MobileNetV2()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def export_onnx(network: MobileNetV2, path: Path) -> None:
    """Write `network` as ONNX with a free batch axis: input `image`, output `logits`."""
    torch.onnx.export(
        network,
        (torch.zeros(2, 3, 224, 224),),
        str(path),
        dynamo=True,
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
        verbose=False,
    )
