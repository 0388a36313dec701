"""Factors for a weight: how x becomes w_1 * ... * w_L. The formulas of each init: `pysteep.factorize`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from .._numbers import is_finite, is_number
from .._ops.options import check_depth
from ..kernels.reference.mirror_step import balanced_factors

Init = Literal["identity", "balanced", "lambda", "saddle", "dwf", "variance"]
INITS: tuple[Init, ...] = get_args(Init)
PRESERVING, RANDOM = INITS[:3], INITS[4:]

DWF_SMALLEST = 3e-3
"""Magnitude below which "dwf" starts no weight."""

VARIANCE_SMALLEST = 0.06
"""The same for "variance", relative to the weight's standard deviation: what "dwf" has at a deviation of 0.05."""

PIECE = 1 << 20  # elements at a time that are held in float64


def check_initial(depth: int, init: str, scale: float | None, q: float) -> int:
    """The depth as Python's int. Raise ValueError that names the argument, its value and what is allowed."""
    whole = check_depth(depth)
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if init in ("lambda", "saddle"):
        if scale is None or not is_finite(scale) or scale <= 0:
            raise ValueError(f"scale must be a finite number > 0 with init {init!r}; got {scale!r}")
    elif scale is not None:
        raise ValueError(f"scale must be None with init {init!r}, which has none; got {scale!r}")
    if not is_number(q) or not 1 <= q <= 2:
        raise ValueError(f"q must be a number in [1, 2]; got {q!r}")
    return whole


@torch.no_grad()
def check_weight(name: str, x: Tensor, init: str, scale: float | None) -> None:
    """Raise ValueError if the values of the weight `name`, or its dtype, do not allow `init`."""
    if scale is not None:
        stored = float(torch.tensor(scale, dtype=x.dtype, device="cpu"))
        if not 0 < stored < math.inf:
            raise ValueError(f"scale must be a number > 0 in the dtype of {name}, {x.dtype}; {scale!r} is stored as {stored}")
    if init in RANDOM and x.numel() and not x.is_meta:
        deviation = _deviation(torch.empty_like(x).copy_(x))
        smallest = DWF_SMALLEST / 2 if init == "dwf" else 0.0
        if not smallest < deviation < math.inf:
            raise ValueError(f"init {init!r} needs a weight of standard deviation above {smallest}; {name} has {deviation}")


@torch.no_grad()
def initial_factors(
    x: Tensor,
    depth: int,
    init: str,
    scale: float | None = None,
    q: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    tied: bool = False,
) -> list[Tensor]:
    """New factors of `x`, checked arguments given.

    Args:
        x: a weight of floating dtype, of any shape and strided layout.
        depth: L.
        init: one of INITS.
        scale: s of "lambda" and "saddle".
        q: the power of the balance |w_j|^q - |w_1|^q = s^q of "lambda".
        generator: on x's device, for "dwf" and "variance".
        tied: w_2 = ... = w_L are returned as one tensor; not with "dwf" and "variance".

    Returns:
        w_1, ..., w_L, or w_1 and w_2 if `tied` (w_1 alone at depth 1): dense, each with memory of its own, in x's dtype and
        memory format.
    """
    first = torch.empty_like(x).copy_(x)  # dense, whatever x is
    if tied and init in RANDOM:
        raise ValueError(f"init must be one of {', '.join(INITS[:4])} for tied factors; got {init!r}")
    if x.is_meta or x.numel() == 0:
        return [torch.empty_like(first) for _ in range(min(depth, 2) if tied else depth)]
    if init in RANDOM:
        return _random_factors(first, depth, init, generator)
    if init == "saddle":
        first.zero_()
    if depth == 1:
        return [first]
    if init in ("identity", "saddle"):
        rest = torch.full_like(first, 1.0 if scale is None else scale)
    else:
        rest = torch.empty_like(first)
        for of_first, of_rest in _pieces(first, rest):
            _balance(of_first, of_rest, depth, q, None if scale is None else scale**q)
    return [first, rest] if tied else [first, rest, *(rest.clone() for _ in range(depth - 2))]


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Dense tensors of one layout side by side, flat in the order of memory, PIECE elements at a time."""
    yield from zip(*(t.as_strided((t.numel(),), (1,)).split(PIECE) for t in tensors), strict=True)


def _balance(first: Tensor, rest: Tensor, depth: int, q: float, balance: float | None) -> None:
    """Make w_1, which holds x, and w_2 = ... = w_L balanced; None: balance 0, where |w_i| = |x|^(1/L)."""
    x = first.double()
    rest.copy_(x.abs() ** (1 / depth) if balance is None else balanced_factors(x, q, depth, balance)[1])
    others = rest.double() ** (depth - 1)  # as stored: w_1 makes up for their rounding, which grows with the depth
    quotient = torch.where(others > 0, x / others, torch.zeros_like(x).copysign(x))
    finite = x.isfinite()
    first.copy_(torch.where(finite, quotient, x))
    rest.copy_(torch.where(finite, rest, x.abs()))


def _deviation(*factors: Tensor) -> float:
    """Standard deviation of the elements of w_1 ... w_L, which are dense."""
    total = torch.zeros(2, dtype=torch.float64, device=factors[0].device)
    for pieces in _pieces(*factors):
        x = pieces[0].double()
        for w in pieces[1:]:
            x = x * w.double()
        total += torch.stack([x.sum(), (x * x).sum()])
    mean, square = (total / factors[0].numel()).tolist()
    variance = square - mean * mean
    return math.sqrt(variance) if variance > 1e-12 * square else 0.0  # below: all the same number, but for rounding


def _random_factors(x: Tensor, depth: int, init: str, generator: torch.Generator | None) -> list[Tensor]:
    """Normal numbers whose magnitudes lie in an interval, by the inverse of their distribution."""
    deviation = _deviation(x)
    smallest, largest = VARIANCE_SMALLEST, 2.0  # of the product of L of them, in units of the deviation
    if init == "dwf":
        smallest, largest = DWF_SMALLEST / deviation, min(2.0, 1.0 / deviation)
    low, high = smallest ** (1 / depth), largest ** (1 / depth)
    at_low, at_high = (0.5 * math.erfc(-bound / math.sqrt(2)) for bound in (low, high))
    factors = [torch.empty_like(x) for _ in range(depth)]
    for w in factors:
        for (piece,) in _pieces(w):
            u = 2 * torch.rand(piece.shape, dtype=torch.float64, device=x.device, generator=generator) - 1
            size = torch.special.ndtri(at_low + (at_high - at_low) * u.abs()).clamp(low, high)
            piece.copy_(deviation ** (1 / depth) * size.copysign(u))
    if init == "variance":
        correction = (deviation / _deviation(*factors)) ** (1 / depth)
        for w in factors:
            w.mul_(correction)
    return factors
