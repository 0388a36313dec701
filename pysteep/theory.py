"""The theory as functions: metric, mirror map, potential, balance, bounds and margin of x = w_1 * ... * w_L.

Source: "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026), whose labels stand in brackets. Where
the formula differs from the paper's print, the docstring says how.

With u(g) = sign(g) |g|^(q-1), factors whose balance |w_j|^q - |w_1|^q is the same number lam for all j >= 2 follow the flow

    dx = -M(x) u(df/dx) dt,    that is    d mirror_map(x) = -u(df/dx) dt    with    d mirror_map / dx = R''(x) = 1 / M(x)

and M(x) = (z + lam)^(L-1) + (L-1) z (z + lam)^(L-2), where z (z + lam)^(L-1) = |x|^q defines z = |w_1|^q >= 0.

Arguments are numbers, NumPy arrays or torch tensors that broadcast against each other; everything is computed in float64. A
tensor among them makes the result a float64 tensor on its device; else it is an array, or a number (numpy.float64) where all
of them are. A ValueError names the argument that is out of its range, its value and the range:

    x, y    finite numbers
    q       numbers in [1, 2]; 1/p + 1/q = 1 for steepest descent in L_p
    depth   L, integers >= 1
    lam     the balance, finite numbers >= 0; the power q of a length in w, so (w_1, w_j) = (0, s) has lam = s^q

The functions of the flow without a closed form need scipy >= 1.15.

>>> from pysteep import theory
>>> theory.mirror_map([0.1, 0.2], q=2, depth=2, lam=0.1)
array([0.72181774, 1.04735627])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .kernels.reference.mirror_step import balanced_factors as _reference_factors

__all__ = [
    "LinfMargin",
    "Reparameterization",
    "balance",
    "balanced_factors",
    "bregman_divergence",
    "coercivity",
    "convergence_bound",
    "convergence_rate",
    "coupled_regularizer",
    "escape_time",
    "hyperbolic_entropy",
    "inverse_metric",
    "inverse_mirror_map",
    "is_bregman",
    "linf_margin",
    "manifold_regularizer",
    "metric_exponent",
    "mirror_map",
    "potential",
    "predicted_balance",
    "steepest_reparameterization",
]

Numbers = ArrayLike | Tensor
Floats = NDArray[np.float64]

RTOL = 1e-14  # of quadrature
PIECE = 4096  # integrals at a time: quadrature holds some hundred points of each
LARGEST = 700.0  # whose exponential is finite


class Reparameterization(NamedTuple):
    """What `steepest_reparameterization` returns: two functions of numbers, arrays or tensors, inverse to each other."""

    x_of_w: Callable[[Numbers], Any]
    w_of_x: Callable[[Numbers], Any]


class LinfMargin(NamedTuple):
    """What `linf_margin` returns."""

    direction: Any
    """Array or tensor (n,) whose largest magnitude is 1."""
    margin: float
    """min_i y_i <direction, z_i>, the largest there is."""
    objective: float
    """max_l |x_l|^(2/L) of x = direction / margin, which satisfies y_i <x, z_i> >= 1: the only number that depends on L."""


# Arguments and results


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


def _floats(value: Numbers) -> Floats | None:
    """None if `value` is not of real numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.numpy() if value.is_complex() else value.double().numpy()
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind in "iuf" else None


def _checked(**arguments: Numbers) -> list[Floats]:
    """Arguments in float64, each in its own shape; ValueError if one is out of its range or shapes do not broadcast."""
    arrays = []
    for key, value in arguments.items():
        allowed, holds = _ALLOWED.get(key, _FINITE)
        array = _floats(value)
        right = False if array is None else holds(array)
        if array is None or not np.all(right):
            wrong = repr(value) if array is None else array[~right].flat[0]
            raise ValueError(f"{key.removesuffix('_or_inf')} must be {allowed}; got {wrong}")
        arrays.append(array)
    try:
        np.broadcast_shapes(*(array.shape for array in arrays))
    except ValueError:
        shapes = ", ".join(f"{key.removesuffix('_or_inf')} {array.shape}" for key, array in zip(arguments, arrays, strict=True))
        raise ValueError(f"shapes must broadcast; got {shapes}") from None
    return arrays


def _like(result: Any, *arguments: Any) -> Any:
    """`result` as a tensor where one of `arguments` is."""
    for value in arguments:
        if isinstance(value, Tensor):
            return torch.from_numpy(np.array(result)).to(value.device)
    return np.asarray(result)[()]


def _sum(terms: Floats) -> Floats:
    """Over the last axis, where there is one."""
    return np.asarray(terms.sum(axis=-1) if terms.ndim else terms)


def _by_geometry(function: Callable[..., Any], x: Floats, q: Floats, depth: Floats, lam: Floats, *others: Floats) -> Floats:
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


# The flow


def _exponent(q: Any, depth: Any) -> Any:
    m = q - q / depth
    return np.where(np.abs(m - 1) < 1e-15, 1.0, m)[()]  # q = L/(L-1) as rounded has exponent 1


def metric_exponent(q: Numbers, depth: Numbers) -> Any:
    """m = q (L-1)/L, the power of |x| by which M grows; it is M = L |x|^m at lam = 0. depth: inf is allowed [Def. 4.12]."""
    return _like(_exponent(*_checked(q=q, depth_or_inf=depth)), q, depth)


def is_bregman(q: Numbers, depth: Numbers) -> Any:
    """Whether the potential is a Bregman function, m <= 1: every L at q = 1, L <= 2 at q = 2 [Cor. 4.14].

    If not, a coordinate reaches infinity in finite time under a gradient bounded from 0. The paper's "no function for p < 2"
    is about q > 2, which is no geometry of this package.
    """
    return _like(_exponent(*_checked(q=q, depth_or_inf=depth)) <= 1, q, depth)


def _factors(x: Floats, q: float, depth: int, lam: Floats) -> tuple[Floats, Floats]:
    """w_1, of x's sign, and w_2 = ... = w_L."""
    first, rest = _reference_factors(torch.from_numpy(x), q, depth, torch.from_numpy(np.array(lam)))
    return first.numpy(), rest.numpy()


def balanced_factors(x: Numbers, q: Numbers, depth: int, lam: Numbers) -> Any:
    """(L, *shape): w_1, ..., w_L with product x and |w_j|^q - |w_1|^q = lam for j >= 2; x's sign is w_1's [Def. 4.6].

    depth: one integer. shape: that of x, q and lam together.
    """
    arrays = _checked(x=x, q=q, depth=depth, lam=lam)
    if arrays[2].ndim:
        raise ValueError(f"depth must be one integer; got shape {arrays[2].shape}")
    first, rest = (_by_geometry(lambda *a, i=i: _factors(*a)[i], *arrays) for i in (0, 1))
    return _like(np.stack([first] + [rest] * (int(arrays[2]) - 1)), x, q, lam)


def _inverse_metric(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    if depth == 1:
        return np.ones_like(x)
    first, rest = (np.abs(w) ** q for w in _factors(x, q, depth, lam))
    return np.asarray(rest ** (depth - 2) * (depth * first + lam))


def inverse_metric(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """M(x) = 1 / R''(x), what depth multiplies a coordinate's speed by; 1 at depth 1 [Thm 4.8, Eq. 14].

    sqrt(4 |x|^q + lam^2) at L = 2 (the last line of the paper's proof drops the 4), L |x|^m at lam = 0.
    """
    return _like(_by_geometry(_inverse_metric, *_checked(x=x, q=q, depth=depth, lam=lam)), x, q, depth, lam)


def _integral(function: Callable[[Floats], Floats], start: float, end: Floats) -> Floats:
    from scipy.integrate import tanhsinh

    pieces = [tanhsinh(function, start, part, rtol=RTOL, atol=0.0).integral for part in _pieces(end)]
    return np.concatenate(pieces).reshape(end.shape) if pieces else np.zeros(end.shape)


def _pieces(x: Floats) -> list[Floats]:
    return [x.reshape(-1)[i : i + PIECE] for i in range(0, x.size, PIECE)]


def _power_integral(end: Floats, power: int, exponent: float, q: float) -> Floats:
    """Integral of v^power (1 + v^q)^exponent from 0 to sinh(end): tiny and huge numbers alike, by v = sinh(t)."""

    def integrand(t: Floats) -> Floats:
        v = np.sinh(t)
        return np.asarray(v**power * np.cosh(t) * np.exp(exponent * np.logaddexp(0.0, q * np.log(v))))

    return _integral(integrand, 0.0, end)


def _numeric_mirror(first: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """Integral of dx / M. It is that of d|w_1| / |w_2|^((L-1)(q-1)), since w_1 moves with u(g w_2^(L-1)); lam > 0."""
    unit, exponent = lam ** (1 / q), (depth - 1) * (q - 1) / q
    return np.asarray(unit / lam**exponent * _power_integral(np.arcsinh(first / unit), 0, -exponent, q))


def _mirror(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """An integral of 1 / M: from 0, and from +-1, of the sign that x or its zero has, where lam = 0 and m >= 1."""
    from scipy.special import boxcox

    size, m = np.abs(x), _exponent(q, depth)
    if not lam.any():
        size = size ** (1 - m) / (1 - m) / depth if m < 1 else boxcox(size, 1 - m) / depth
    elif q == 2 and depth == 2:
        size = np.arcsinh(2 * size / lam) / 2
    else:
        first = np.abs(_factors(x, q, depth, lam)[0])
        size = first if q == 1 or depth == 1 else _numeric_mirror(first, q, depth, lam)
    return np.asarray(np.copysign(1.0, x) * size)


def _numeric_inverse(size: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """|x| from the integral of dx / M, inf where that is beyond its end; lam > 0."""
    from scipy.optimize.elementwise import bracket_root, find_root

    unit, exponent = lam ** (1 / q), (depth - 1) * (q - 1) / q
    size = size * lam**exponent / unit

    def excess(t: Floats, size: Floats) -> Floats:
        return _power_integral(t, 0, -exponent, q) - size

    start = np.minimum(np.arcsinh(size) + 1, LARGEST / 2)  # the integral is less than sinh(t)
    bracket = bracket_root(excess, np.zeros_like(start), start, xmin=0.0, xmax=LARGEST, args=(size,), maxiter=60)
    root = find_root(excess, bracket.bracket, args=(size,))
    t = np.where(root.success, root.x, np.inf)
    first = unit * np.sinh(t)
    return np.asarray(first * (first**q + lam) ** ((depth - 1) / q))


def _inverse_mirror(y: Floats, q: float, depth: int, lam: Floats, sign: Floats) -> Floats:
    """Of `_mirror`; `sign` is that of x where lam = 0 and m >= 1."""
    from scipy.special import inv_boxcox

    size, m = np.abs(y), _exponent(q, depth)
    if not lam.any() and m >= 1:
        largest = 1 / (m - 1) if m > 1 else np.inf
        y = depth * y * sign
        return np.asarray(sign * np.where(y < largest, inv_boxcox(y, 1 - m), np.inf))
    if not lam.any():
        size = (depth * (1 - m) * size) ** (1 / (1 - m))
    elif q == 2 and depth == 2:
        size = np.sinh(2 * size) * lam / 2
    elif q == 1 or depth == 1:
        size = size * (size + lam) ** (depth - 1)
    else:
        size = _numeric_inverse(size, q, depth, lam)
    return np.copysign(size, y)


def _check_base(names: tuple[str, str], x: Floats, x_0: Floats, q: Floats, depth: Floats, lam: Floats) -> None:
    """ValueError where x and x_0 do not lie on one side of 0 although lam = 0 and m >= 1, where M / |x| is 0 at 0."""
    singular = (lam == 0) & (_exponent(q, depth) >= 1)
    where = "where lam = 0 and q (L-1)/L >= 1"
    if np.any(singular & (x_0 == 0)):
        raise ValueError(f"{names[1]} must be another number than 0 {where}; got 0.0")
    opposite = np.broadcast_arrays(x, singular & (x * x_0 < 0))
    if opposite[1].any():
        raise ValueError(f"{names[0]} must have the sign of {names[1]} {where}; got {opposite[0][opposite[1]].flat[0]}")


def mirror_map(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """R'(x), the integral of ds / M(s) from x_0 to x: the coordinate that moves with -u(df/dx) alone [Thm 4.8, Lemma 4.13].

    Closed at q = 2, L = 2: asinh(2x/lam)/2; at q = 1: the y with y (|y| + lam)^(L-1) = x, that is w_1; at lam = 0:
    sign(x) |x|^(1-m) / (L (1-m)), and at m = 1 sign(x_0) log(x/x_0) / L, where the paper prints only x_0 > 0. Else by
    quadrature, to about 13 digits. [Ex. 3.2] prints x/lam, which does not have its metric.

    x_0: where R' is 0. Where lam = 0 and m >= 1 it must not be 0, and x must be of its sign or 0, where R' is infinite.
    """
    a, *geometry, base = _checked(x=x, q=q, depth=depth, lam=lam, x_0=x_0)
    _check_base(("x", "x_0"), a, base, *geometry)
    result = _by_geometry(_mirror, np.where(a == 0, np.copysign(0.0, base), a), *geometry)
    return _like(result - _by_geometry(_mirror, base, *geometry) if base.any() else result, x, q, depth, lam, x_0)


def inverse_mirror_map(y: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """The x with mirror_map(x) = y, the derivative of the convex conjugate R*; closed where `mirror_map` is.

    Where m > 1 the mirror map has an end in finite y (that is why R is no Bregman function): from there on x is +-inf.
    """
    a, *geometry, base = _checked(y=y, q=q, depth=depth, lam=lam, x_0=x_0)
    _check_base(("y", "x_0"), np.zeros(()), base, *geometry)
    if base.any():
        a = a + _by_geometry(_mirror, base, *geometry)
    return _like(_by_geometry(_inverse_mirror, a, *geometry, np.where(base < 0, -1.0, 1.0)), y, q, depth, lam, x_0)


def _potential(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """The integral of `_mirror` from 0."""
    from scipy.special import boxcox

    size, m = np.abs(x), _exponent(q, depth)
    if not lam.any():
        if m < 1:
            return np.asarray(size ** (2 - m) / ((2 - m) * (1 - m) * depth))
        return np.where(size == 0, 0.0, size * (boxcox(size, 1 - m) - 1) / ((2 - m) * depth))
    if q == 2 and depth == 2:
        return _hyperbolic_entropy(size, lam / 2) / 2
    return _numeric_potential(size, q, depth, lam)


def _numeric_potential(size: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """By parts: |x| R'(|x|) less the integral of s / M(s), which is that of w_1 |w_2|^((L-1)(2-q)) d|w_1|; lam > 0."""
    first = _factors(size, q, depth, lam)[0]
    if q == 2 or depth == 1:
        rest = first**2 / 2
    else:
        unit, exponent = lam ** (1 / q), (depth - 1) * (2 - q) / q
        rest = unit**2 * lam**exponent * _power_integral(np.arcsinh(first / unit), 1, exponent, q)
    return size * _mirror(size, q, depth, lam) - rest


def potential(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """R(x), coordinate by coordinate: R' = mirror_map with the same x_0, R(0) = 0 [Lemma 4.13, Ex. 3.2].

    hyperbolic_entropy(x, lam/2)/2 at q = 2, L = 2 (the paper prints x/lam and 2 lam^2, which do not have its metric);
    (|x| log(x/x_0) - |x|)/L at lam = 0 and m = 1; (|x|^(2-m)/(2-m) - x x_0 |x_0|^(-m)) / (L - (L-1) q) at other m.
    x_0: as of `mirror_map`, with the same bounds on x.
    """
    a, *geometry, base = _checked(x=x, q=q, depth=depth, lam=lam, x_0=x_0)
    _check_base(("x", "x_0"), a, base, *geometry)
    result = _by_geometry(_potential, a, *geometry)
    return _like(result - a * _by_geometry(_mirror, base, *geometry) if base.any() else result, x, q, depth, lam, x_0)


def bregman_divergence(x: Numbers, y: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """D(x, y) = R(x) - R(y) - R'(y) (x - y), summed over the last axis of all arguments together [Def. B.8].

    Numbers give a number. No x_0: D does not depend on it. Where lam = 0 and m >= 1, x and y must be of one sign and y not 0.
    """
    a, b, *geometry = _checked(x=x, y=y, q=q, depth=depth, lam=lam)
    _check_base(("x", "y"), a, b, *geometry)
    values = [_by_geometry(_potential, of, *geometry) for of in (a, b)]
    terms = values[0] - values[1] - _by_geometry(_mirror, b, *geometry) * (a - b)
    return _like(_sum(np.maximum(terms, 0.0)), x, y, q, depth, lam)  # it is convex: less than 0 is rounding


def escape_time(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """Time from 0 to |x| under a gradient of magnitude 1: mirror_map(|x|), and infinite where lam = 0 and m >= 1."""
    a, *geometry = _checked(x=x, q=q, depth=depth, lam=lam)
    never = (geometry[2] == 0) & (_exponent(geometry[0], geometry[1]) >= 1)
    times = _by_geometry(_mirror, np.abs(a), *geometry)
    return _like(np.where(a == 0, 0.0, np.where(never, np.inf, times)), x, q, depth, lam)


def hyperbolic_entropy(x: Numbers, beta: Numbers) -> Any:
    """x asinh(x/beta) - sqrt(x^2 + beta^2) + beta, elementwise: 0 at 0; beta > 0 (Ghai et al. 2020)."""
    return _like(_hyperbolic_entropy(*_checked(x=x, beta=beta)), x, beta)


def _hyperbolic_entropy(x: Floats, beta: Floats) -> Floats:
    return np.asarray(x * np.arcsinh(x / beta) - x * (x / (np.hypot(x, beta) + beta)))


# Balance


def balance(factors: Sequence[Numbers] | NDArray[Any] | Tensor, q: Numbers) -> Any:
    """(L-1, ...): |w_j|^q - |w_1|^q for j >= 2, of L factors of one shape or an array (L, ...) [Lemma 4.5]."""
    parts = [factors] if isinstance(factors, Tensor | np.ndarray) else list(factors)
    arrays = [_checked(factors=part)[0] for part in parts]
    if len({array.shape for array in arrays}) != 1:
        raise ValueError(f"factors must be one or more of one shape; got shapes {[array.shape for array in arrays]}")
    w = arrays[0] if isinstance(factors, Tensor | np.ndarray) else np.stack(arrays)
    if w.ndim == 0 or len(w) == 0:
        raise ValueError(f"factors must be an array (L, ...) with L >= 1; got shape {w.shape}")
    power = _checked(factors=w[0], q=q)[1]
    powers = np.abs(w) ** power
    return _like(powers[1:] - powers[:1], *parts, q)


def predicted_balance(initial: Numbers, q: Numbers, lr: Numbers, weight_decay: Numbers, steps: int) -> Any:
    """Balance after `steps` steps: initial prod_t |1 - lr_t weight_decay_t|^q, up to O(lr) [Lemma 4.5].

    initial: of any shape, against which q broadcasts. lr, weight_decay: one number >= 0, or one for each step.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps must be an int >= 0; got {steps!r}")
    start, power = _checked(initial=initial, q=q)
    rates, decays = _checked(lr=lr)[0], _checked(weight_decay=weight_decay)[0]
    for name, array in (("lr", rates), ("weight_decay", decays)):
        if array.shape not in ((), (steps,)):
            raise ValueError(f"{name} must be one number or one for each of {steps} steps; got shape {array.shape}")
    kept = np.broadcast_to(np.abs(1 - rates * decays), (steps,)).prod()
    return _like(start * kept**power, initial, q, lr, weight_decay)


# Decay


def manifold_regularizer(x: Numbers, q: Numbers, depth: Numbers) -> Any:
    """What decoupled decay adds to the objective's side of the mirror flow at lam = 0 [Thm 4.16], for a decay of 1.

    The sum over the last axis of |x|^(2-m) L / (L (2-q) + q), of log|x| where m = 2, which is q = 2 at depth inf. Its
    gradient is L x / M(x). depth: inf is allowed.
    """
    a, *geometry = _checked(x=x, q=q, depth_or_inf=depth)
    power = 2 - _exponent(*geometry)
    with np.errstate(divide="ignore"):
        terms = np.where(power == 0, np.log(np.abs(a)), np.abs(a) ** power / np.where(power == 0, 1.0, power))
    return _like(_sum(terms), x, q, depth)


def coupled_regularizer(x: Numbers, depth: Numbers) -> Any:
    """Sum over the last axis of L |x|^(2/L), the least |w_1|^2 + ... + |w_L|^2; coupled decay c adds c/2 of it to the loss.

    At lam = 0 it is what the factors have; less L, it goes to the sum of 2 log|x| as L grows [Table 1].
    """
    a, deep = _checked(x=x, depth=depth)
    return _like(_sum(deep * np.abs(a) ** (2 / deep)), x, depth)


# Convergence


def coercivity(q: Numbers, depth: Numbers, *, lam: Numbers | None = None, scale: Numbers | None = None) -> Any:
    """mu = lam^(L-1), the least M(x) [Def. 4.1, Cor. 4.9]; with `scale` s > 0 in place of lam, s^(q(L-1)): w_j = s, w_1 = 0.

    The paper calls s lambda in [Cor. 4.10].
    """
    if (lam is None) == (scale is None):
        raise ValueError(f"lam or scale must be given, not both; got lam {lam!r}, scale {scale!r}")
    if lam is not None:
        power, deep, level = _checked(q=q, depth=depth, lam=lam)
        return _like(np.broadcast_arrays(level ** (deep - 1), power)[0], q, depth, lam)
    power, deep, level = _checked(q=q, depth=depth, scale=scale)  # type: ignore[arg-type]
    return _like(level ** (power * (deep - 1)), q, depth, scale)


def convergence_bound(q: Numbers, depth: Numbers, lam: Numbers, loss_gap: Numbers, gradient_bound: Numbers) -> Any:
    """What the integral of |grad f|_2^2 over all time cannot exceed: B^(2-q) (f(x_0) - f(x_inf)) / mu [Thm 4.2].

    loss_gap: f(x_0) - f(x_inf) >= 0 (the paper prints its negative). gradient_bound: B > 0, no |df/dx_i| of the flow is more.
    """
    power, deep, level, gap, bound = _checked(q=q, depth=depth, lam=lam, loss_gap=loss_gap, gradient_bound=gradient_bound)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = np.where(gap == 0, 0.0, bound ** (2 - power) * gap / level ** (deep - 1))
    return _like(result, q, depth, lam, loss_gap, gradient_bound)


def convergence_rate(q: Numbers, depth: Numbers, lam: Numbers, pl_constant: Numbers, gradient_bound: Numbers) -> Any:
    """Rate r of f(x_t) - f* <= exp(-r t) (f(x_0) - f*): 2 mu B^(q-2) Lambda [Thm 4.2].

    pl_constant: Lambda > 0 with |grad f|_2^2 / 2 >= Lambda (f - f*) [Def. B.2], a strongly convex f's constant. The paper
    prints half this rate, as its proof leaves out the 2 of its definition. gradient_bound: B, as of `convergence_bound`.
    """
    checked = _checked(q=q, depth=depth, lam=lam, pl_constant=pl_constant, gradient_bound=gradient_bound)
    power, deep, level, constant, bound = checked
    result = 2 * level ** (deep - 1) * bound ** (power - 2) * constant
    return _like(result, q, depth, lam, pl_constant, gradient_bound)


# Beyond products


def steepest_reparameterization(
    second_derivative: Callable[[Floats], Floats],
    q: float,
    *,
    x_0: float = 0.0,
    domain: tuple[float, float] = (-np.inf, np.inf),
) -> Reparameterization:
    """The x = g(w) whose steepest descent flow in w is the mirror flow of R in x, by quadrature [Thm G.1].

    w(x) is the integral of R''(s)^(1/q) from x_0 to x, and g its inverse. (The paper's proof starts with a minus that is none.)

    Args:
        second_derivative: R'' > 0 of arrays, elementwise, in `domain`; for depth, lambda s: 1 / inverse_metric(s, q, L, lam).
        q: one number in [1, 2].
        x_0: where w is 0, inside `domain`.
        domain: open interval of x.

    Returns:
        (x_of_w, w_of_x). Where w is out of w(x)'s range, x_of_w is that end of the domain.

    Raises:
        ValueError: q or x_0 are not as above; later, x is not in the domain.
        TypeError: second_derivative is not callable.
    """
    power, start = _checked(q=q, x_0=x_0)
    if not callable(second_derivative):
        raise TypeError(f"second_derivative must be a function; got {second_derivative!r}")
    if power.ndim or start.ndim:
        raise ValueError(f"q and x_0 must be single numbers; got shapes {power.shape} and {start.shape}")
    low, high = domain
    if not low < x_0 < high:
        raise ValueError(f"x_0 must lie inside the domain {domain}; got {x_0}")

    def integrand(x: Floats) -> Floats:
        return np.asarray(second_derivative(x) ** (1 / power))

    def w_of_x(x: Numbers) -> Any:
        (a,) = _checked(x=x)
        outside = ~((low < a) & (a < high))
        if outside.any():
            raise ValueError(f"x must lie inside the domain {domain}; got {a[outside].flat[0]}")
        with np.errstate(all="ignore"):
            return _like(_integral(integrand, x_0, a), x)

    def x_of_w(w: Numbers) -> Any:
        from scipy.optimize.elementwise import bracket_root, find_root

        def excess(x: Floats, w: Floats) -> Floats:
            return _integral(integrand, x_0, x) - w

        (a,) = _checked(w=w)
        below, above = (x_0 + side * min(1.0, abs(end - x_0) / 2) for side, end in ((-1, low), (1, high)))
        with np.errstate(all="ignore"):
            first = np.full(a.shape, below), np.full(a.shape, above)
            bracket = bracket_root(excess, *first, xmin=low, xmax=high, args=(a,), maxiter=60)
            root = find_root(excess, bracket.bracket, args=(a,))
        return _like(np.where(bracket.success, root.x, np.where(a > 0, high, low)), w)

    return Reparameterization(x_of_w, w_of_x)


def linf_margin(Z: Numbers, y: Numbers, depth: int) -> LinfMargin:
    """The limit direction of sign descent on separable data: min max_l |x_l|^(2/L) so that y_i <x, z_i> >= 1 [Thm F.1].

    The root is monotone, so x is the L_inf maximum-margin direction whatever the depth: a linear program. Where it has many
    solutions, one of them.

    Args:
        Z: samples z_i, (k, n).
        y: labels -1 and 1, (k,).
        depth: L, one integer; only `objective` depends on it.

    Raises:
        ValueError: shapes or values are not as above, or no x has y_i <x, z_i> > 0 for all i.
    """
    from scipy.optimize import linprog

    samples, labels, deep = (_checked(**{name: value})[0] for name, value in (("Z", Z), ("y", y), ("depth", depth)))
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"Z must be of shape (k, n) with k, n >= 1; got {samples.shape}")
    if labels.shape != samples.shape[:1]:
        raise ValueError(f"y must be of shape {samples.shape[:1]}, one label for each row of Z; got {labels.shape}")
    if not np.all(np.abs(labels) == 1):
        raise ValueError(f"y must be of -1 and 1; got {labels[np.abs(labels) != 1][0]}")
    if deep.ndim:
        raise ValueError(f"depth must be one integer; got shape {deep.shape}")
    k, n = samples.shape
    signed = labels[:, None] * samples
    # Largest t with y_i <x, z_i> >= t for all i, |x_l| <= 1.
    solution = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.column_stack([-signed, np.ones(k)]),
        b_ub=np.zeros(k),
        bounds=[(-1, 1)] * n + [(0, None)],
    )
    x = solution.x[:n]
    x = x / max(np.abs(x).max(), np.finfo(float).tiny)
    margin = float((signed @ x).min())
    if margin <= 1e-9 * np.abs(signed).max():
        raise ValueError("Z must be separated by y: no x has y_i <x, z_i> > 0 for all i")
    return LinfMargin(_like(x, Z, y), margin, margin ** (-2 / float(deep)))
