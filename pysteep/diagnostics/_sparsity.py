"""How sparse the weights of a model are, for thresholds that mean the same at every depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .._numbers import check_function, is_finite
from .._ops.options import check_depth
from .._selection import Match, Place, check_model, choices
from ..factorize import _factorized, _plain
from ._masks import hold

__all__ = ["SparsityReport", "sparsity_report"]

THRESHOLDS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
PIECE = 1 << 18  # elements at a time, which a core's cache holds

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SparsityReport:
    """Counts of small weights, by layer and threshold; `str()` is a table. Made by `sparsity_report`.

    Args:
        names: of the weights, [layers].
        depths: L of each, [layers].
        sizes: coordinates of each, [layers].
        zeros: how many of them are exactly 0, [layers].
        nans: how many are NaN, [layers]; these are below no threshold.
        thresholds: t, ascending, [thresholds].
        below: how many coordinates have |x| <= t^L, [layers, thresholds].
        left_out: coordinates of the model's other parameters.
        scores: what `evaluate` gave with those below each threshold set to 0, [thresholds]; None without it.
    """

    names: tuple[str, ...]
    depths: Array
    sizes: Array
    zeros: Array
    nans: Array
    thresholds: Array
    below: Array
    left_out: int
    scores: Array | None = None

    @property
    def cutoffs(self) -> Array:
        """t^L, [layers, thresholds]."""
        return np.asarray(self.thresholds ** self.depths[:, None])

    @property
    def shares(self) -> Array:
        """Share of each layer's coordinates below each threshold, [layers, thresholds]; NaN for a weight without any."""
        return _quotient(self.below, self.sizes[:, None])

    @property
    def share(self) -> Array:
        """The same of all chosen weights together, [thresholds]."""
        return _quotient(self.below.sum(0), self.sizes.sum())

    @property
    def compression(self) -> Array:
        """Chosen coordinates by those that are not below each threshold, [thresholds]; inf where none remains."""
        return _quotient(self.sizes.sum(), self.sizes.sum() - self.below.sum(0))

    def __str__(self) -> str:
        rows = [["weight", "L", "size", "zeros", "NaN", *(f"t = {t:g}" for t in self.thresholds)]]
        for i, name in enumerate(self.names):
            cells = [f"({cutoff:.2g}) {share:.2%}" for share, cutoff in zip(self.shares[i], self.cutoffs[i], strict=True)]
            numbers = (self.depths[i], self.sizes[i], self.zeros[i], self.nans[i])
            rows.append([name, *(str(number) for number in numbers), *cells])
        totals = [str(counts.sum()) for counts in (self.sizes, self.zeros, self.nans)]
        rows.append(["all", "", *totals, *(f"{share:.2%}" for share in self.share)])
        rows.append(["compression", "", "", "", "", *(f"{ratio:.4g}" for ratio in self.compression)])
        if self.scores is not None:
            rows.append(["score", "", "", "", "", *(f"{score:.6g}" for score in self.scores)])
        return f"{table(rows)}\nShares of |x| <= t^L (in brackets). Parameters left out: {self.left_out}"


def sparsity_report(
    model: nn.Module,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    match: Match = None,
    optimizer: Optimizer | None = None,
    depth: int | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> SparsityReport:
    """Count the weights below thresholds on the size of a factor.

    A coordinate x of depth L is below t where |x| <= t^L, as if all its factors were of size t: a fixed 1e-7 on x would mean
    factors of 3e-4 at L = 2 and of 0.2 at L = 10. Factorised weights (`pysteep.factorize`) count as their products, tied ones
    once, and masked coordinates (`prune_`) as 0, which is written where an optimiser has moved them.

    Args:
        model: any module.
        thresholds: t >= 0; 0 counts exact zeros.
        match: which weights. None: `weight` of every nn.Linear, Bilinear, Conv, ConvTranspose, Embedding and EmbeddingBag. A
            shell-style pattern such as "encoder.*": those of them whose full name fits. A function (name, parameter) -> bool:
            any parameters.
        optimizer: where the depths of weights are read that a pysteep.SteepestDescent trains.
        depth: L of the weights that are not factorised, where no optimiser says it, as after `pysteep.collapse`; None: 1.
        evaluate: called with `model` once for each threshold, in ascending order, while coordinates below it are 0 (at
            threshold 0 the model is as it is); returns a number such as an accuracy. It runs without gradients; whether the
            model is in evaluation mode is its business. Weights are put back afterwards, bit for bit, also if it raises, and a
            SteepestDescent trains on as if nothing had been. Takes a copy of the weights.

    Returns:
        The report.

    Raises:
        ValueError, TypeError: an argument is not as above; a parameter is uninitialised, or a chosen one is not dense
            or of integers.

    Source: Section 4 and Appendix J of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026).
    """
    if isinstance(thresholds, Real):
        raise TypeError(f"thresholds must be a sequence of numbers; got {thresholds!r}")
    if evaluate is not None:
        check_function("evaluate", evaluate)
    ascending = sorted(check_threshold("thresholds", t) for t in thresholds)
    with dense_weights(model, match, optimizer, depth) as weights:
        counts = _counts(weights, ascending)
        inside = sum(weight.value.numel() for weight in weights)
        left_out = sum(parameter.numel() for parameter in model.parameters()) - inside
        scores = None if evaluate is None else _scores(model, weights, ascending, evaluate)
    return SparsityReport(
        names=tuple(weight.name for weight in weights),
        depths=np.array([weight.depth for weight in weights]),
        sizes=np.array([weight.value.numel() for weight in weights]),
        zeros=counts[:, 1],
        nans=counts[:, 0],
        thresholds=np.array(ascending, np.float64),
        below=counts[:, 2:],
        left_out=left_out,
        scores=scores,
    )


# ---- weights as one tensor each ----------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """A chosen weight, factorised or not."""

    name: str
    places: list[Place]
    value: Parameter
    depth: int

    def small(self, threshold: float) -> Tensor:
        """Where |x| <= threshold^depth; not where x is NaN."""
        return self.value.detach().abs() <= cutoff(threshold, self.depth, self.value.dtype)


@contextmanager
def dense_weights(
    model: nn.Module, match: Match, optimizer: Optimizer | None = None, depth: int | None = None
) -> Iterator[list[Weight]]:
    """The chosen weights, while the factorised ones of `model` are plain parameters: their products."""
    check_model(model)
    if optimizer is not None and depth is not None:
        raise ValueError(f"depth must be None where optimizer is given, which has it; got {depth!r}")
    if depth is not None:
        depth = check_depth(depth)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"{name} must hold numbers; it is uninitialised: call or load the model before")
    hold(model)
    deep = {} if optimizer is None else _depths(optimizer)
    deep_products = {
        (place.module, place.attribute): sum(deep.get(factor, 1) for factor in weight.factors)
        for weight in _factorized(model)
        for place in weight.places
    }
    with _plain(model):
        weights = []
        for value, places in choices(model, match):
            if value.layout != torch.strided or not (value.is_floating_point() or value.is_complex()):
                kind = f"{value.dtype}, {value.layout}"
                raise ValueError(f"{places[0].name} must be floating or complex and dense (torch.strided); got {kind}")
            plain = deep.get(value, 1 if depth is None else depth)
            deep_here = deep_products.get((places[0].module, places[0].attribute), plain)
            weights.append(Weight(places[0].name, places, value, deep_here))
        yield weights


def _depths(optimizer: Optimizer) -> dict[Tensor, int]:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    return {parameter: group.get("depth", 1) for group in optimizer.param_groups for parameter in group["params"]}


def check_threshold(name: str, threshold: float) -> float:
    """The threshold as a float. Raises ValueError that names the argument."""
    if not is_finite(threshold) or threshold < 0:
        allowed = "a finite number >= 0" if name == "threshold" else "finite numbers >= 0"
        raise ValueError(f"{name} must be {allowed}; got {threshold!r}")
    return float(threshold)


def cutoff(threshold: float, depth: int, dtype: torch.dtype) -> float:
    """The largest number of the dtype that is not above threshold^depth: a comparison would round to the nearest."""
    power = torch.tensor(threshold, dtype=torch.float64, device="cpu") ** depth
    real = dtype.to_real() if dtype.is_complex else dtype
    nearest = power.clamp(max=torch.finfo(real).max).to(real)
    if nearest.double() > power:
        nearest = nearest.nextafter(torch.zeros_like(nearest))
    return float(nearest)


# ---- counting ----------------------------------------------------------------------------------------------------------------


def _counts(weights: list[Weight], thresholds: Sequence[float]) -> Array:
    """[layers, 2 + thresholds]: NaN, exact zeros, and coordinates below each threshold.

    Sizes are compared by their bits, whose order is that of the numbers, with NaN above infinity. NumPy compares and counts
    several times as fast as torch does here, by one thread that nobody else's work delays.
    """
    counts = np.zeros((len(weights), 2 + len(thresholds)), np.int64)
    for row, weight in zip(counts, weights, strict=True):
        x = weight.value.detach().cpu()
        x = x.abs() if x.is_complex() else x
        cutoffs = (cutoff(t, weight.depth, x.dtype) for t in thresholds)
        limits = torch.tensor([torch.inf, 0.0, *cutoffs], dtype=x.dtype, device="cpu")
        infinity, *largest = _bits(limits)
        in_memory = sorted(range(x.ndim), key=x.stride, reverse=True)
        for piece in x.permute(in_memory).reshape(-1).split(PIECE):
            sizes = _bits(piece)
            row += [np.count_nonzero(sizes > infinity), *(np.count_nonzero(sizes <= c) for c in largest)]
    return counts


def _bits(x: Tensor) -> Array:
    """The bits of |x| as unsigned integers, for a real tensor [n] on the CPU."""
    bits = x.view(getattr(torch, f"uint{8 * x.itemsize}")).numpy()
    sizes: Array = bits & bits.dtype.type(2 ** (8 * x.itemsize - 1) - 1)
    return sizes


@torch.no_grad()
def _scores(
    model: nn.Module, weights: list[Weight], thresholds: Sequence[float], evaluate: Callable[[nn.Module], float]
) -> Array:
    """What `evaluate` gives for each threshold.

    Written through `.data`: an optimiser that looks at version counters must not notice.
    """
    before = [weight.value.detach().clone() for weight in weights]
    scores = []
    try:
        for threshold in thresholds:
            for weight in weights:
                weight.value.data.masked_fill_(weight.small(threshold), 0)
            scores.append(float(evaluate(model)))
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.value.data.copy_(value)
    return np.array(scores)


def _quotient(a: Any, b: Any) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(a, b))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
