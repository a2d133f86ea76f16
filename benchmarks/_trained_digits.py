"""Two really trained classifiers with labels: a residual and a depthwise network on scikit-learn's handwritten digits.

Seeded; the images are scaled to 64 x 64 and given three channels. Training takes about a minute each on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

NUM_HELD_OUT = 397
SIDE = 64
_NOISE = 0.05


@dataclass(frozen=True)
class Digits:
    """Images [cases, 3, 64, 64] float32 about zero and their labels; the held-out ones are never trained on."""

    train: torch.Tensor
    train_labels: torch.Tensor
    held_out: np.ndarray[Any, Any]
    held_out_labels: np.ndarray[Any, Any]


def load() -> Digits:
    """The digits in a seeded order."""
    digits = load_digits()
    order = np.random.default_rng(5).permutation(len(digits.images))
    images = torch.from_numpy(digits.images[order].astype(np.float32))[:, None] / 8 - 1
    images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
    labels = digits.target[order]
    return Digits(
        train=images[NUM_HELD_OUT:],
        train_labels=torch.from_numpy(labels[NUM_HELD_OUT:]),
        held_out=images[:NUM_HELD_OUT].numpy(),
        held_out_labels=labels[:NUM_HELD_OUT],
    )


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def residual_network() -> nn.Module:
    """Seven convolutions of up to 256 channels and three shortcuts."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Residual(32, 64, 1),
        Residual(64, 128, 2),
        Residual(128, 256, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def _separable(inner: int, outer: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, outer, 1, bias=False),
        nn.BatchNorm2d(outer),
        nn.ReLU(),
    )


def depthwise_network() -> nn.Module:
    """Six depthwise separable convolutions of up to 512 channels (MobileNet v1's block, arXiv:1704.04861)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        _separable(32, 64, 1),
        _separable(64, 128, 2),
        _separable(128, 256, 1),
        _separable(256, 256, 2),
        _separable(256, 512, 1),
        _separable(512, 512, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def train(network: nn.Module, digits: Digits, num_epochs: int) -> nn.Module:
    """Train with noise as the only augmentation; the same seed gives the same weights on one machine."""
    torch.manual_seed(3)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    steps = num_epochs * (len(digits.train) // 50)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    network.train()
    for _ in range(num_epochs):
        for batch in torch.randperm(len(digits.train))[: len(digits.train) // 50 * 50].view(-1, 50):
            images = digits.train[batch] + _NOISE * torch.randn(50, 3, SIDE, SIDE)
            optimiser.zero_grad()
            F.cross_entropy(network(images), digits.train_labels[batch]).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def export(network: nn.Module, path: Path) -> None:
    """Write the network as ONNX with a free batch axis."""
    torch.onnx.export(
        network,
        (torch.zeros(2, 3, SIDE, SIDE),),
        str(path),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        external_data=False,
        verbose=False,
    )
