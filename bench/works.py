"""The work that contenders share: tensors of real shapes, and the fewest bytes that a step over them must move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The 161 parameters of ResNet-50 (He et al. 2015), 25 557 032 weights."""

    def norm(channels: int) -> list[tuple[int, ...]]:
        return [(channels,), (channels,)]

    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), *norm(64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            shapes += [
                (width, channels, 1, 1),
                *norm(width),
                (width, width, 3, 3),
                *norm(width),
                (out, width, 1, 1),
                *norm(out),
            ]
            if block == 0:
                shapes += [(out, channels, 1, 1), *norm(out)]
            channels = out
    return [*shapes, (1000, 2048), (1000,)]


@dataclass(frozen=True)
class Work:
    """Tensors to step over."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def weights(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def bytes(self, dtype: torch.dtype) -> int:
        """Read the weight and the gradient, write the weight."""
        return 3 * self.weights * dtype.itemsize

    def parameters(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
        """Random parameters with random gradients, none of them 0; each role one after another in one block of memory.

        All contenders of a run step on the same parameters, and the triad runs over the same blocks: how fast memory is
        depends on which of it the system gave.
        """
        padded = [-(-math.prod(shape) // 32) * 32 for shape in self.shapes]  # each starts where an allocation might
        weights, gradients = (_random(sum(padded), seed, dtype, device) for seed in (0, 1))
        gradients *= 1e-2
        parameters, begin = [], 0
        for shape, elements in zip(self.shapes, padded, strict=True):
            part = slice(begin, begin + math.prod(shape))
            parameters.append(nn.Parameter(weights[part].view(shape)))
            parameters[-1].grad = gradients[part].view(shape)
            begin += elements
        return parameters


def _random(elements: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    values = torch.randn(elements, generator=torch.Generator(device).manual_seed(seed), dtype=dtype, device=device)
    return values.add_(values.sign(), alpha=0.1)


RESNET50 = Work("ResNet-50, 161 tensors", tuple(resnet50_shapes()))
ONE_LARGE = Work("one tensor of 50 M", ((50_000_000,),))
MANY_TINY = Work("161 tensors of 8", ((8,),) * 161)
WORKS = (RESNET50, ONE_LARGE, MANY_TINY)
