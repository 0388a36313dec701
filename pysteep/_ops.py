"""Every op of pysteep as torch sees it: schema, fake, implementation. torch.compile and torch.export go through these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._factor_product import check_factors, gradients, no_third_derivative, product, second_gradients
from ._steepest_step import prepare

_library = torch.library.Library("pysteep", "DEF")


def _steepest_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    q: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    coupled_weight_decay: float,
    normalize: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None,
) -> None:
    prepare(
        list(weights),
        list(gradients),
        list(momenta),
        lr=lr if lr_tensor is None else lr_tensor,
        q=q,
        betas=(beta1, beta2),
        weight_decay=weight_decay,
        coupled_weight_decay=coupled_weight_decay,
        normalize=normalize,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        backend=backend,
    )()


def _no_output(*_: object) -> None:
    """What a fake does for an op that only writes to its arguments."""


_library.define("steepest_step" + torch.library.infer_schema(_steepest_step, mutates_args=("weights", "momenta")))
_library.impl("steepest_step", _steepest_step, "CompositeExplicitAutograd")
torch.library.register_fake("pysteep::steepest_step", _no_output, lib=_library)


def _factor_product(factors: Sequence[Tensor], backend: str | None) -> Tensor:
    return product(check_factors(factors), backend)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    *tensors, factors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *factors)


def _product_gradients(ctx: Any, gradient: Tensor) -> Any:
    return torch.ops.pysteep.factor_product_backward(gradient, list(ctx.saved_tensors), ctx.backend), None


def _product_second_gradients(ctx: Any, tangents: list[Tensor | None]) -> Any:
    gradient, *factors = ctx.saved_tensors
    filled = [torch.zeros_like(w) if v is None else v for w, v in zip(factors, tangents, strict=True)]
    of_gradient, *of_factors = torch.ops.pysteep.factor_product_double_backward(gradient, factors, filled, ctx.backend)
    return of_gradient, of_factors, None


def _define(op: str, implementation: Callable[..., Any], fake: Callable[..., Any], derivative: Callable[..., Any]) -> None:
    _library.define(op + torch.library.infer_schema(implementation, mutates_args=()))
    _library.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pysteep::{op}", fake, lib=_library)
    keep = None if derivative is no_third_derivative else _keep
    torch.library.register_autograd(f"pysteep::{op}", derivative, setup_context=keep, lib=_library)


def _one_like(factors: Sequence[Tensor], _: str | None) -> Tensor:
    return torch.empty_like(check_factors(factors)[0])


def _one_for_each(gradient: Tensor, factors: Sequence[Tensor], _: str | None) -> list[Tensor]:  # noqa: ARG001
    return [torch.empty_like(factors[0]) for _ in factors]


def _one_more(gradient: Tensor, factors: Sequence[Tensor], tangents: Sequence[Tensor], _: str | None) -> list[Tensor]:  # noqa: ARG001
    return [torch.empty_like(factors[0]) for _ in range(len(factors) + 1)]


_define("factor_product", _factor_product, _one_like, _product_gradients)
_define("factor_product_backward", gradients, _one_for_each, _product_second_gradients)
_define("factor_product_double_backward", second_gradients, _one_more, no_third_derivative)


def call_op(
    weights: list[Tensor],
    gradients: list[Tensor | None],
    momenta: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    **options: Any,
) -> None:
    """The registered op, for code that torch.compile traces; arguments as of `prepare`."""
    used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    torch.ops.pysteep.steepest_step(
        [weights[i] for i in used],
        [gradients[i] for i in used],
        [momenta[i] for i in used] if momenta else [],
        lr if isinstance(lr, Tensor) else None,
        0.0 if isinstance(lr, Tensor) else lr,
        beta1=betas[0],
        beta2=betas[1],
        **options,
    )
