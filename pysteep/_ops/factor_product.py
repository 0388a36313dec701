"""factor_product on any tensors: checks, layout, the home, and two derivatives. Formulas: kernels/reference/factor_product.py.

Eager code calls the home inside autograd Functions; traced code calls the registered ops, whose implementations are
`product`, `gradients` and `second_gradients` below.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .dispatch import choose
from .layout import FLOATING, is_unallocated
from .options import MAX_DEPTH

"""How many factors a product may have, on every backend."""


def check_factors(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors as a list. Raises ValueError or TypeError that names the factor, its value and what is allowed."""
    if isinstance(factors, Tensor):
        raise TypeError("factors must be a sequence of tensors; got one torch.Tensor")
    tensors = list(factors)
    if not 1 <= len(tensors) <= MAX_DEPTH:
        raise ValueError(f"factors must hold 1 to {MAX_DEPTH} tensors; got {len(tensors)}")
    first = tensors[0]
    for i, w in enumerate(tensors):
        if not isinstance(w, Tensor):
            raise TypeError(f"factor {i} must be a torch.Tensor; got {w!r}")
        if w.layout != torch.strided:
            raise TypeError(f"factor {i} must be dense (torch.strided); got {w.layout}: call .to_dense() on it")
        if type(w) not in (Tensor, Parameter) and is_traceable_wrapper_subclass(w):
            raise TypeError(f"factor {i} must hold its own memory; got a {type(w).__name__}")
        if w.dtype not in FLOATING:
            raise TypeError(f"factor {i} must be float16, bfloat16, float32 or float64; got {w.dtype}")
        if w.dtype != first.dtype:
            raise TypeError(f"factor {i} must have factor 0's dtype {first.dtype}; got {w.dtype}")
        if w.shape != first.shape:
            raise ValueError(f"factor {i} must have factor 0's shape {tuple(first.shape)}; got {tuple(w.shape)}")
        if w.device != first.device:
            raise ValueError(f"factor {i} must be on factor 0's device {first.device}; got {w.device}")
    return tensors


def is_traced(factors: Sequence[Tensor]) -> bool:
    """Whether somebody watches the ops that run, so that a kernel called past the dispatcher would go unseen."""
    watched = torch.utils._python_dispatch._get_current_dispatch_mode() is not None
    return watched or any(isinstance(w, FakeTensor) for w in factors)


def _home(template: Tensor, backend: str | None) -> ModuleType:
    return choose(backend, template.device, "factor_product").home("factor_product")


def _like(template: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor itself if it is laid out as the dense `template`, else such a copy."""
    strides, contiguous = template.stride(), template.is_contiguous()
    result = []
    for tensor in tensors:
        t = tensor if tensor.layout == torch.strided else tensor.to_dense()  # a gradient of nn.Embedding(sparse=True)
        if is_unallocated(t):
            if not t._is_zerotensor():  # of forward-mode differentiation
                raise TypeError(f"a factor and its gradient must hold their own memory; got a {type(t).__name__} that has none")
            t = torch.zeros_like(template)
        fits = (t.stride() == strides or (contiguous and t.is_contiguous())) and not t.is_neg()
        result.append(t if fits else torch.empty_like(template).copy_(t))
    return result


def product(factors: Sequence[Tensor], backend: str | None) -> Tensor:
    """x = w_1 ... w_L in the memory format of w_1."""
    result = torch.empty_like(factors[0])
    if result.numel():
        _home(result, backend).factor_product(_like(result, factors), result)
    return result


def gradients(gradient: Tensor, factors: Sequence[Tensor], backend: str | None) -> list[Tensor]:
    """dw_1, ..., dw_L from dx."""
    results = [torch.empty_like(factors[0]) for _ in factors]
    template = results[0]
    if template.numel():
        laid_out = _like(template, [gradient, *factors])
        _home(template, backend).factor_product_backward(laid_out[0], laid_out[1:], results)
    return results


def second_gradients(
    gradient: Tensor, factors: Sequence[Tensor], tangents: Sequence[Tensor], backend: str | None
) -> list[Tensor]:
    """ddx, ddw_1, ..., ddw_L from the gradients of dw_1, ..., dw_L."""
    depth = len(factors)
    result, *results = [torch.empty_like(factors[0]) for _ in range(depth + 1)]
    if result.numel():
        g, *laid_out = _like(result, [gradient, *factors, *tangents])
        home = _home(result, backend)
        home.factor_product_double_backward(g, laid_out[:depth], laid_out[depth:], result, results)
    return [result, *results]


def no_third_derivative(*_: object) -> Any:
    """What differentiates the second derivative."""
    raise RuntimeError("pysteep.functional.factor_product is differentiable twice, not three times")


def _batched(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What torch.vmap hands to a Function, with the batch as dimension 0 of every tensor."""
    return [
        t.unsqueeze(0).expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for dim, t in zip(dims, tensors, strict=True)
    ]


# Each Function takes the backend, then its tensors: forward and setup_context apart, as torch.func asks. Forward-mode
# derivatives are sums of the same products: the tangent of x is sum_i v_i dw_i at dx = 1.


class _Function(Function):
    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """As Function.apply, but for a search for default arguments that takes longer than the product of a small weight."""
        base: Any = super() if torch._C._are_functorch_transforms_active() else super(Function, cls)
        return base.apply(*arguments)


class Product(_Function):
    """x from w_1, ..., w_L; keeps the factors for its derivatives, no product of some of them."""

    @staticmethod
    def forward(backend: str | None, *factors: Tensor) -> Tensor:
        return product(factors, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.backend, *factors = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, *_Gradients.apply(ctx.backend, gradient, *ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        factors = ctx.saved_tensors
        of_factors = _Gradients.apply(ctx.backend, torch.ones_like(factors[0]), *factors)
        total = torch.zeros_like(factors[0])
        for v, g in zip(tangents, of_factors, strict=True):
            total = total if v is None else total + v * g
        return total

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], backend: str | None, *factors: Tensor) -> tuple[Tensor, int]:
        return Product.apply(backend, *_batched(info, in_dims[1:], factors)), 0


class _Gradients(_Function):
    """dw_1, ..., dw_L from dx and w_1, ..., w_L."""

    @staticmethod
    def forward(backend: str | None, gradient: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradients(gradient, factors, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        return (None, *_SecondGradients.apply(ctx.backend, *ctx.saved_tensors, *tangents))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        gradient, *factors = ctx.saved_tensors
        of_gradient, *of_factors = (torch.zeros_like(gradient) if v is None else v for v in tangents)
        _, *results = _SecondGradients.apply(ctx.backend, gradient, *factors, *of_factors)
        return tuple(a + b for a, b in zip(results, _Gradients.apply(ctx.backend, of_gradient, *factors), strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], backend: str | None, *tensors: Tensor) -> tuple[Any, tuple[int, ...]]:
        results = _Gradients.apply(backend, *_batched(info, in_dims[1:], tensors))
        return results, (0,) * len(results)


class _SecondGradients(_Function):
    """ddx, ddw_1, ..., ddw_L from dx, w_1, ..., w_L and their tangents v_1, ..., v_L."""

    @staticmethod
    def forward(backend: str | None, gradient: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        depth = len(tensors) // 2
        return tuple(second_gradients(gradient, tensors[:depth], tensors[depth:], backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no third derivative."""

    @staticmethod
    def backward(*arguments: Any) -> Any:
        return no_third_derivative(*arguments)

    @staticmethod
    def jvp(*arguments: Any) -> Any:
        return no_third_derivative(*arguments)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], backend: str | None, *tensors: Tensor) -> tuple[Any, tuple[int, ...]]:
        results = _SecondGradients.apply(backend, *_batched(info, in_dims[1:], tensors))
        return results, (0,) * len(results)
