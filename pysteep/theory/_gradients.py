"""Results of NumPy that differentiate through torch, by slopes that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._arguments import Floats, Numbers, checked, like, requires_gradient

Slope = Callable[..., Tensor]


def elementwise(function: Callable[..., Floats], slopes: Mapping[str, Slope], arguments: dict[str, Numbers]) -> Any:
    """function(*checked arguments), with a gradient for those of `slopes` that require one.

    A slope is the derivative by its argument, of all arguments as float64 tensors of one shape. It is made of torch's functions
    and of this one, so that the gradient differentiates in turn.
    """
    arrays = checked(slopes, **arguments)
    if not any(requires_gradient(arguments[key]) for key in slopes):
        return like(function(*arrays), *arguments.values())
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    tensors = [
        (value if requires_gradient(value) else torch.from_numpy(array)).to(device, torch.float64)  # type: ignore[union-attr]
        for value, array in zip(arguments.values(), arrays, strict=True)
    ]
    apply: Callable[..., Tensor] = _Elementwise.apply
    return apply(function, [slopes.get(key) for key in arguments], *torch.broadcast_tensors(*tensors))


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Floats], slopes: list[Slope | None], *tensors: Tensor) -> Tensor:
        ctx.slopes = slopes
        ctx.save_for_backward(*tensors)
        return like(function(*(t.detach().cpu().numpy() for t in tensors)), tensors[0])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        needed = zip(ctx.slopes, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient * slope(*ctx.saved_tensors) if need else None for slope, need in needed)
