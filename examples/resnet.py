"""Residual networks from a random start: ResNet-20 for small images, ResNet-50 of transformers."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions beside an identity, which takes every other pixel and zeros where the width grows [He et al. 2016]."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.stride, self.grown = stride, outside - inside
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        skipped = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grown // 2, self.grown - self.grown // 2))
        return F.relu(y + skipped)


def resnet20(channels: int, classes: int) -> nn.Sequential:
    """270 000 parameters; images [n, channels, size, size] of any size from 4 up, logits [n, classes]."""
    widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    stem = (nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    net = nn.Sequential(
        *stem, *(Block(*width) for width in widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return net


class ResNet50(nn.Module):
    """25.6 million parameters at 1000 classes; images [n, channels, size, size], logits [n, classes]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        self.net = ResNetForImageClassification(ResNetConfig(num_channels=channels, num_labels=classes))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x).logits)


MODELS = {"resnet20": resnet20, "resnet50": ResNet50}
