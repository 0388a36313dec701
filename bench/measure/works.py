"""The work that contenders share: tensors of real shapes, and the fewest bytes that a step over them must move."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from . import models


@dataclass(frozen=True)
class Work:
    """Tensors to step over."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def weights(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def bytes(self, dtype: torch.dtype, words: float = 3) -> int:
        """Words of memory for each weight: by default read the weight and the gradient, write the weight."""
        return round(words * self.weights) * dtype.itemsize

    def at_most(self, weights: int) -> Work:
        """Its first tensors; of one that is larger a part."""
        shapes: list[tuple[int, ...]] = []
        for shape in self.shapes:
            left = weights - sum(map(math.prod, shapes))
            if math.prod(shape) > left:
                return Work(self.name, (*shapes, (left,)) if left else tuple(shapes))
            shapes.append(shape)
        return self

    def parameters(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
        """Random parameters with random gradients, none of them 0; each role one after another in one block of memory.

        All contenders of a run step on the same parameters, and the triad runs over the same blocks: how fast memory is
        depends on which of it the system gave.
        """
        padded = [-(-math.prod(shape) // 32) * 32 for shape in self.shapes]  # each starts where an allocation might
        weights, gradients = (random(sum(padded), seed, dtype, device) for seed in (0, 1))
        parameters, begin = [], 0
        for shape, elements in zip(self.shapes, padded, strict=True):
            part = slice(begin, begin + math.prod(shape))
            parameters.append(nn.Parameter(weights[part].view(shape)))
            parameters[-1].grad = gradients[part].view(shape)
            begin += elements
        return parameters


PERIOD = 1 << 22


def random(elements: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Of a normal distribution without its middle; repeated after `PERIOD`, as drawing takes longer than any step."""
    drawn = torch.randn(min(elements, PERIOD), generator=torch.Generator(device).manual_seed(seed), dtype=dtype, device=device)
    drawn.add_(torch.where(drawn < 0, -0.1, 0.1))
    if elements <= PERIOD:
        return drawn
    values = torch.empty(elements, dtype=dtype, device=device)
    for part in values.split(PERIOD):
        part.copy_(drawn[: len(part)])
    return values


def sample(tensors: Sequence[Tensor], elements: int = 1 << 18) -> list[Tensor]:
    """Copies of evenly spaced elements of each tensor and of its last ones: `elements` of all, or a little more."""
    stride = max(1, sum(t.numel() for t in tensors) // elements) | 1  # odd: not always the same place of a vector
    return [torch.cat([flat[::stride], flat[-64:]]) for flat in (t.detach().reshape(-1) for t in tensors)]


def memory(device: str) -> int:
    """Free bytes."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


@functools.cache
def llama_8b(dtype: torch.dtype, device: str) -> Work:
    """As many of its layers as leave half of the memory to what contenders allocate."""
    per_weight = 2 * dtype.itemsize  # a weight and its gradient
    layers = models.LLAMA_8B_LAYERS
    while layers > 1 and Work("", tuple(models.llama_8b(layers))).weights * per_weight > memory(device) / 2:
        layers -= 1
    name = "Llama-8B" if layers == models.LLAMA_8B_LAYERS else f"Llama-8B, {layers} of its 32 layers"
    return Work(name, tuple(models.llama_8b(layers)))


RESNET50 = Work("ResNet-50, 161 tensors", tuple(models.resnet50()))
VIT_LARGE = Work("ViT-L, 392 tensors", tuple(models.vit_large()))
BERT_BASE = Work("BERT-base, 199 tensors", tuple(models.bert_base()))
ONE_LARGE = Work("one tensor of 50 M", ((50_000_000,),))
ONE_HUGE = Work("one tensor of 1 G", ((1_000_000_000,),))
MANY_TINY = Work("161 tensors of 8", ((8,),) * 161)
THOUSANDS = Work("4000 tensors of 100", ((100,),) * 4000)


def works(dtype: torch.dtype, device: str) -> list[Work]:
    huge = ONE_HUGE if device == "cuda" else ONE_LARGE
    return [RESNET50, VIT_LARGE, BERT_BASE, llama_8b(dtype, device), huge, THOUSANDS]
