"""Every op of pysteep as torch sees it: schema, fake, implementation. torch.compile and torch.export go through these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..kernels.number import Number
from ..kernels.reference.rounding import SIXTEEN
from ..kernels.rounding import Rounding
from . import factor_step, mirror_step, steepest_step
from .factor_product import check_factors, gradients, no_third_derivative, product, second_gradients
from .options import StepOptions, check_betas, check_rate, is_zero
from .rounding import as_int16, count_step

_library = torch.library.Library("pysteep", "DEF")

_RATE = "Tensor? lr_tensor, float lr, float q, float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf"
_DIRECTION = "Tensor? beta1_tensor, float beta1, Tensor? beta2_tensor, float beta2, float coupled_weight_decay"
_ROUNDING = "str rounding, int seed, Tensor? step_tensor, float step, int[] streams"
# The number of an `Owner`, or 0, one of its parameter groups, and which of the group's parameters the weights are.
_OWNER = "int optimizer=0, int group=0, int[] used=[]"


class Owner(Protocol):
    """Whose parameters the weights of a compiled step are: it looks at them before the step, as the compiler guards neither."""

    def trainable(self, group: int, used: Sequence[int], gradients: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients that the step was given, None for each parameter that is frozen now."""

    def repair(
        self,
        group: int,
        used: Sequence[int],
        weights: Sequence[Tensor],
        factors: Sequence[Sequence[Tensor]],
        momenta: Sequence[Sequence[Tensor]],
        compensations: Sequence[Sequence[Tensor | None]],
    ) -> None:
        """Make the factors of weights anew where somebody else wrote to these.

        Args:
            group: index of the parameter group.
            used: which of its parameters the weights are; they may lie elsewhere, as the compiler likes.
            weights: read.
            factors, momenta, compensations: those of each weight that are stored; written.
        """


_owners: WeakValueDictionary[int, Owner] = WeakValueDictionary()
_numbers = count(1)


def add_owner(owner: Owner) -> int:
    """The number by which the ops know it, for as long as somebody holds it."""
    number = next(_numbers)
    _owners[number] = owner
    return number


def _trainable(optimizer: int, group: int, used: Sequence[int], gradients: list[Tensor]) -> Sequence[Tensor | None]:
    return _owners[optimizer].trainable(group, used, gradients) if optimizer else gradients


def _options(
    lr_tensor: Tensor | None,
    lr: float,
    rounding: str,
    seed: int,
    step_tensor: Tensor | None,
    step: float,
    streams: list[int],
    backend: str | None,
    **options: Any,
) -> tuple[StepOptions, dict[str, Any]]:
    """The options and other arguments of `prepare` from those of an op; numbers may have changed since they were traced."""
    options["lr"] = lr if lr_tensor is None else lr_tensor
    check_rate(options["lr"])
    if "beta1" in options:
        options["betas"] = _given(options, "beta1"), _given(options, "beta2")
        check_betas(options["betas"])
    step_now = step if step_tensor is None else step_tensor
    of_rounding = Rounding(rounding, seed % 2**64, step_now, streams, [0] * len(streams))
    return StepOptions(**options), {"rounding": of_rounding, "backend": backend}


def _given(options: dict[str, Any], name: str) -> float | Tensor:
    """A number that an op has as a tensor, or else as a float; no option any more."""
    value: float = options.pop(name)
    tensor: Tensor | None = options.pop(f"{name}_tensor")
    return value if tensor is None else tensor


def _for_each(rounded: list[Tensor], compensations: list[Tensor]) -> list[Tensor | None]:
    """The compensations, or None, of each tensor; an op is given those that there are."""
    given = iter(compensations)
    return [as_int16(next(given)) if tensor.dtype in SIXTEEN else None for tensor in rounded] if compensations else []


def _steepest(
    weights: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    compensations: list[Tensor],
    *,
    optimizer: int = 0,
    group: int = 0,
    used: Sequence[int] = (),
    **options: Any,
) -> None:
    of_rounding, seen = _for_each(weights, compensations), _trainable(optimizer, group, used, gradients)
    own, others = _options(**options)
    steepest_step.prepare(weights, seen, momenta, own, **others, compensations=of_rounding)()


def _factor(
    weights: list[Tensor],
    gradients: list[Tensor],
    factors: list[Tensor],
    momenta: list[Tensor],
    compensations: list[Tensor],
    *,
    optimizer: int = 0,
    group: int = 0,
    used: Sequence[int] = (),
    **options: Any,
) -> None:
    n, seen = len(weights), _trainable(optimizer, group, used, gradients)
    stored, buffers = ([tensors[i::n] for i in range(n)] for tensors in (factors, momenta))
    every = _for_each(factors, compensations)
    of_rounding = [every[i::n] for i in range(n)]
    (own, others), written = _options(**options), weights
    if optimizer:
        _owners[optimizer].repair(group, used, weights, stored, buffers, of_rounding)
        if is_zero(own.lr):
            written = [torch.empty_like(weight) for weight in weights]
            increment_version(weights)
    lists = (buffers if momenta else []), (of_rounding if compensations else [])
    factor_step.prepare(written, seen, stored, lists[0], own, **others, compensations=lists[1])()


def _mirror(
    weights: list[Tensor],
    gradients: list[Tensor],
    balances: list[Tensor],
    compensations: list[Tensor],
    *,
    optimizer: int = 0,
    group: int = 0,
    used: Sequence[int] = (),
    **options: Any,
) -> None:
    of_rounding, seen = _for_each(weights, compensations), _trainable(optimizer, group, used, gradients)
    own, others = _options(**options)
    mirror_step.prepare(weights, seen, balances, own, **others, compensations=of_rounding)()


def _define_step(op: str, arguments: str, implementation: Callable[..., None]) -> None:
    options = f"{_RATE}, {_ROUNDING}, str? backend, {_OWNER}"
    # Before each step the host asks which parameters are frozen and, at depth, whether somebody else wrote to them; no CUDA
    # graph would replay that. torch.compile(mode="reduce-overhead") launches steps beside its graphs: that costs one call.
    tags = [torch.Tag.cudagraph_unsafe]
    _library.define(f"{op}(Tensor(a!)[] weights, Tensor[] gradients, {arguments}, {options}) -> ()", tags=tags)
    _library.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pysteep::{op}", lambda *_, **__: None, lib=_library)


_define_step("steepest_step", f"Tensor(b!)[] momenta, Tensor(c!)[] compensations, *, bool normalize, {_DIRECTION}", _steepest)
_define_step("mirror_step", "Tensor(b!)[] balances, Tensor(c!)[] compensations, *, int depth", _mirror)
# Factor k of weight i is factors[k * len(weights) + i]; momenta likewise, and compensations, of which there are those of what
# has one, as int16 or as an optimizer keeps them.
_define_step(
    "factor_step",
    f"Tensor(b!)[] factors, Tensor(c!)[] momenta, Tensor(d!)[] compensations, *, int depth, {_DIRECTION}",
    _factor,
)

# An op, because torch 2.13's compiler drops an addition in place to a tensor of a parameter group.
_library.define("count_step(Tensor(a!) step, Tensor? lr_tensor, float lr) -> ()")
_library.impl(
    "count_step", lambda step, tensor, lr: count_step(step, lr if tensor is None else tensor), "CompositeExplicitAutograd"
)
torch.library.register_fake("pysteep::count_step", lambda *_: None, lib=_library)


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


_COMMON = ("q", "weight_decay", "maximize", "grad_scale", "found_inf")
_FURTHER = {  # lr and betas aside
    "steepest_step": ("coupled_weight_decay", "normalize"),
    "factor_step": ("coupled_weight_decay", "depth"),
    "mirror_step": ("depth",),
}


def call_step(
    op: str,
    *roles: Sequence[Tensor | None],
    options: StepOptions,
    rounding: Rounding,
    streams: Sequence[int],
    backend: str | None,
    **owner: Any,
) -> None:
    """A registered step, for code that torch.compile traces: what its schema names first, then the options of `prepare`.

    `streams`: those of the rounding for the weights of this call. Of the compensations, the last role, None are left out.
    `owner`: optimizer, group and used.
    """
    given: dict[str, Any] = {name: getattr(options, name) for name in (*_COMMON, *_FURTHER[op])}
    given["lr_tensor"], given["lr"] = _as_tensor_or_float(options.lr)
    if op != "mirror_step":
        for name, beta in zip(("beta1", "beta2"), options.betas, strict=True):
            given[f"{name}_tensor"], given[name] = _as_tensor_or_float(beta)
    given["step_tensor"], given["step"] = _as_tensor_or_float(rounding.step)
    given["seed"] = rounding.seed - 2**64 if rounding.seed >= 2**63 else rounding.seed  # an int of torch has a sign
    present = [tensor for tensor in roles[-1] if tensor is not None]
    given |= {"rounding": rounding.mode, "streams": list(streams), "backend": backend, **owner}
    getattr(torch.ops.pysteep, op)(*roles[:-1], present, **given)


def _as_tensor_or_float(value: Number) -> tuple[Tensor | None, float]:
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value))
