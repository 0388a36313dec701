"""Arguments of the functions of the theory, their results, and integrals."""

from __future__ import annotations

from collections.abc import Callable, Container
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .._numbers import holds_flag
from .._ops.layout import check_readable

Numbers = ArrayLike | Tensor
Floats = NDArray[np.float64]

RTOL = 1e-14  # of quadrature
PIECE = 4096  # integrals at a time: quadrature holds some hundred points of each


def _at_least_one_integer(v: Floats) -> Any:
    return (v >= 1) & (v == np.floor(v))


_POSITIVE: tuple[str, Callable[[Floats], Any]] = ("a finite number > 0", lambda v: (v > 0) & (v < np.inf))
_NOT_NEGATIVE: tuple[str, Callable[[Floats], Any]] = ("a finite number >= 0", lambda v: (v >= 0) & (v < np.inf))
_FINITE: tuple[str, Callable[[Floats], Any]] = ("a finite number", np.isfinite)
_ALLOWED: dict[str, tuple[str, Callable[[Floats], Any]]] = {
    "q": ("a number in [1, 2]", lambda v: (v >= 1) & (v <= 2)),
    "depth": ("an integer >= 1", lambda v: _at_least_one_integer(v) & (v < np.inf)),
    "depth_or_inf": ("an integer >= 1 or inf", _at_least_one_integer),
    "lam": _NOT_NEGATIVE,
    "lr": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "loss_gap": _NOT_NEGATIVE,
    "scale": _POSITIVE,
    "beta": _POSITIVE,
    "gradient_bound": _POSITIVE,
    "pl_constant": _POSITIVE,
}


def floats(value: Numbers) -> Floats | None:
    """None if `value` is not of real numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().resolve_conj()
        value = value.numpy() if value.is_complex() or value.dtype == torch.bool else value.double().numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        return None
    return array.astype(np.float64) if array.dtype.kind in "iuf" and not holds_flag(value) else None


def requires_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def checked(differentiable: Container[str] = (), /, **arguments: Numbers) -> list[Floats]:
    """Arguments in float64, each in its own shape.

    TypeError if one is a tensor whose numbers cannot be read: sparse, or without memory. ValueError if one is out of its range,
    shapes do not broadcast, or one requires a gradient and is not `differentiable`.
    """
    arrays = []
    for key, value in arguments.items():
        name = key.removesuffix("_or_inf")
        if isinstance(value, Tensor):
            check_readable(name, value)
        if requires_gradient(value) and key not in differentiable:
            raise ValueError(
                f"{name} must not require a gradient, which is not computed for it here; got a tensor with requires_grad=True: "
                f"pass {name}.detach()"
            )
        allowed, holds = _ALLOWED.get(key, _FINITE)
        array = floats(value)
        right = False if array is None else holds(array)
        if array is None or not np.all(right):
            wrong = repr(value) if array is None else array[~right].flat[0]
            raise ValueError(f"{name} must be {allowed}; got {wrong}")
        arrays.append(array)
    try:
        np.broadcast_shapes(*(array.shape for array in arrays))
    except ValueError:
        shapes = ", ".join(f"{key.removesuffix('_or_inf')} {array.shape}" for key, array in zip(arguments, arrays, strict=True))
        raise ValueError(f"shapes must broadcast; got {shapes}") from None
    return arrays


def like(result: Any, *arguments: Any) -> Any:
    """`result` as a tensor where one of `arguments` is."""
    for value in arguments:
        if isinstance(value, Tensor):
            return torch.from_numpy(np.array(result)).to(value.device)
    return np.asarray(result)[()]


def sum_last(terms: Any) -> Any:
    """Over the last axis, where there is one."""
    return terms.sum(-1) if terms.ndim else terms


def by_geometry(function: Callable[..., Any], x: Floats, q: Floats, depth: Floats, lam: Floats, *others: Floats) -> Floats:
    """Call function(x, q, depth, lam, *others), flat, for each q and depth, with lam either 0 or positive everywhere."""
    geometries = list(product(np.unique(q), np.unique(depth), (True, False)))
    x, q, depth, lam, *others = np.broadcast_arrays(x, q, depth, lam, *others)  # type: ignore[assignment]
    result = np.empty(x.shape)
    for power, deep, zero in geometries:
        here = (q == power) & (depth == deep) & ((lam == 0) == zero)
        if here.any():
            with np.errstate(all="ignore"):
                result[here] = function(x[here], float(power), int(deep), lam[here], *(other[here] for other in others))
    return result


def exponent_of(q: Any, depth: Any) -> Any:
    m = q - q / depth
    return np.where(np.abs(m - 1) < 1e-15, 1.0, m)[()]  # q = L/(L-1) as rounded has exponent 1


def integral(function: Callable[[Floats], Floats], start: float, end: Floats) -> Floats:
    from scipy.integrate import tanhsinh

    pieces = [tanhsinh(function, start, part, rtol=RTOL, atol=0.0).integral for part in _pieces(end)]
    return np.concatenate(pieces).reshape(end.shape) if pieces else np.zeros(end.shape)


def _pieces(x: Floats) -> list[Floats]:
    return [x.reshape(-1)[i : i + PIECE] for i in range(0, x.size, PIECE)]
