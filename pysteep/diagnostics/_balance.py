"""Balance of factors, |w_j|^q - |w_1|^q, now and while they are trained, beside what Lemma 4.5 says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from .._numbers import as_integer, check_function, is_number
from ..factorize import _factorized, _plain, check_optimizer
from ..optim import SteepestDescent
from ._pairs import Pair, Part, attention_pairs, whole
from ._sparsity import table

__all__ = ["BalanceMonitor", "BalanceRecord", "BalanceReport", "LayerBalance", "PairBalance", "balance_report"]

PIECE = 1 << 20  # elements at a time that are held in float64


class LayerBalance(NamedTuple):
    """Balance |w_j|^q - |w_1|^q of a weight of `depth` factors, over all coordinates and j >= 2; NaN for an empty weight."""

    name: str
    depth: int
    q: float
    mean: float
    lowest: float
    highest: float
    mean_absolute: float


class PairBalance(NamedTuple):
    """Norms of two matrices: of W, the sum of |w|^q over its entries."""

    layer: str
    q: float
    first: float
    second: float

    @property
    def difference(self) -> float:
        """The balance of the pair, | ||W_1||_q^q - ||W_2||_q^q |."""
        return abs(self.first - self.second)


@dataclass(frozen=True)
class BalanceReport:
    """Made by `balance_report`; `str()` is a table.

    Args:
        layers: weights of several factors.
        pairs: matrices that stand one behind the other, such as query and key.
    """

    layers: tuple[LayerBalance, ...]
    pairs: tuple[PairBalance, ...]

    def __str__(self) -> str:
        tables = []
        if self.layers:
            rows = [[name, str(depth), *(f"{number:.4g}" for number in numbers)] for name, depth, *numbers in self.layers]
            tables.append(table([["weight", "L", "q", "mean", "lowest", "highest", "mean |balance|"], *rows]))
        if self.pairs:
            rows = [[pair.layer, *(f"{number:.6g}" for number in (*pair[1:], pair.difference))] for pair in self.pairs]
            tables.append(table([["pair", "q", "|W_1|_q^q", "|W_2|_q^q", "|difference|"], *rows]))
        return "\n\n".join(tables)


def balance_report(
    source: nn.Module | SteepestDescent, q: float | None = None, pairs: str | Sequence[tuple[str, str]] | None = "auto"
) -> BalanceReport:
    """Measure how balanced factors are, in float64.

    Args:
        source: a `pysteep.SteepestDescent`: the factors of its parameters at depth > 1, made now where there are none yet. Or a
            model: the factors of its factorised weights (`pysteep.factorize`), and pairs of matrices. No weight changes.
        q: from 1 to 2, for a model; None: 1. An optimiser's groups have their own.
        pairs: of a model: "auto" for query and key of the attention layers that are known by their names; or
            [(name, name), ...] of parameters; or None. A factorised weight counts as its product.

    Returns:
        The report.

    Raises:
        ValueError, TypeError: an argument is not as above, or there is nothing to measure.

    Source: Lemma 4.5 and Appendix H of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026).
    """
    if isinstance(source, SteepestDescent):
        if q is not None or pairs not in ("auto", None):
            raise ValueError(f"q and pairs must be left out for an optimizer; got q={q!r} and pairs={pairs!r}")
        layers, found = _of_optimizer(source), tuple[PairBalance, ...]()
        if not layers:
            raise ValueError("source must train a parameter at depth > 1; this optimizer has none")
    elif isinstance(source, nn.Module):
        power = _check_q(1.0 if q is None else q)
        layers, found = _of_model(source, power), _pair_balances(source, power, pairs)
        if not (layers or found):
            raise ValueError("source must have factorised weights of depth > 1 or pairs of matrices; this model has neither")
    else:
        raise TypeError(f"source must be a model or a pysteep.SteepestDescent; got {type(source).__name__}")
    return BalanceReport(tuple(_layer_balance(layer) for layer in layers), found)


class BalanceRecord(NamedTuple):
    """A layer after `step` steps: mean balance, what Lemma 4.5 predicts, and the mean over coordinates of their distance."""

    step: int
    name: str
    mean: float
    predicted: float
    distance: float


class BalanceMonitor:
    """Watch balance while an optimiser trains, beside Lemma 4.5: each coordinate's, times the product of (1 - lr wd)^q.

    >>> with BalanceMonitor(optimizer, every=100) as monitor:
    ...     train()
    >>> monitor.history[-1]
    BalanceRecord(step=1000, name='0.weight', mean=..., predicted=..., distance=...)

    A hook of `optimizer.step` measures after every `every`-th one; the first records are of step 0. In between no GPU is waited
    for. The law holds to first order in lr, without momentum, for the steepest descent of that q with decoupled decay; lr and
    weight_decay are read at each step. A weight that is written to from outside has new factors, of which the law knows
    nothing: make a new monitor then.

    Coupled decay is not in the prediction, so that the distance shows what it does; but for q = 2, where both kinds are the
    same. It is the `coupled_weight_decay` of SteepestDescent, and the `weight_decay` of torch.optim.SGD and of optimisers whose
    groups say "decoupled_weight_decay": False, as Adam's do. Any other optimiser's `weight_decay` is taken as decoupled and
    multiplied by lr. Parameters without a gradient, and steps that a gradient scaler skips inside the optimiser, do not decay.

    Args:
        optimizer: a `pysteep.SteepestDescent` with depth, whose factors are made now; with `model`, any torch.optim.Optimizer.
        model: a factorised model (`pysteep.factorize`), whose factors `optimizer` trains.
        q: from 1 to 2, the power of the balance; None where the optimiser's groups have it.
        every: steps from one record to the next, >= 1.
        coordinates: keep the first balance of each coordinate for `distance`: a float32 (float64 for float64) for each
            coordinate and each factor but w_1; once where those are one tensor, as with storage "tied" and "implicit".
            Without them `distance` is NaN.
        on_record: called with each BalanceRecord as it is made, such as to write it to a file.

    Attributes:
        history: the list of BalanceRecords.
        step: how many steps were seen.

    Raises:
        ValueError, TypeError: an argument is not as above; factors of a weight are in several groups of the optimiser, or none.

    Source: Lemma 4.5 and Table 4 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        q: float | None = None,
        *,
        every: int = 1,
        coordinates: bool = True,
        on_record: Callable[[BalanceRecord], None] | None = None,
    ) -> None:
        interval = as_integer(every)
        if interval is None or interval < 1:
            raise ValueError(f"every must be an int >= 1; got {every!r}")
        if on_record is not None:
            check_function("on_record", on_record)
        self._layers = _watched(optimizer, model, q)
        self.every, self.on_record, self.step = interval, on_record, 0
        self.history: list[BalanceRecord] = []
        self._decay: list[Any] = []
        self._states = [_State(layer, coordinates) for layer in self._layers]
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._record()

    def remove(self) -> None:
        """Stop watching; `history` stays."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> BalanceMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Before, as something that runs after a step may have set the next lr; a closure makes its gradients only in the step.
        self._decay = [_decay(optimizer, layer) for layer in self._layers]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.step += 1
        found_inf = getattr(optimizer, "found_inf", None)
        taken = 1.0 if found_inf is None else (found_inf == 0).double().reshape(())
        for layer, state, decay in zip(self._layers, self._states, self._decay, strict=True):
            if all(parameter.grad is not None for parameter in layer.parameters):
                state.kept = state.kept * (1 - decay * taken)
        if self.step % self.every == 0:
            self._record()

    def _record(self) -> None:
        for layer, state in zip(self._layers, self._states, strict=True):
            mean, distance = state.measure()
            self.history.append(BalanceRecord(self.step, layer.name, mean, state.first_mean * state.share(), distance))
            if self.on_record is not None:
                self.on_record(self.history[-1])


# ---- layers ------------------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """A weight, its factors and who trains them."""

    name: str
    q: float
    factors: Callable[[], Sequence[Tensor]]
    parameters: Sequence[Tensor]
    group: int = 0  # of the optimiser, whose groups are other objects after load_state_dict


def _of_optimizer(optimizer: SteepestDescent) -> list[_Layer]:
    result = []
    for number, group in enumerate(optimizer.param_groups):
        if group["depth"] > 1:
            names = group.get("param_names") or [f"group {number}, param {i}" for i in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                result.append(_Layer(name, group["q"], partial(optimizer.factors, parameter), [parameter], number))
    return result


def _of_model(model: nn.Module, q: float) -> list[_Layer]:
    return [
        _Layer(weight.places[0].name, q, partial(list, weight.factors), weight.factors)
        for weight in _factorized(model)
        if len(weight.factors) > 1
    ]


def _watched(optimizer: Optimizer, model: nn.Module | None, q: float | None) -> list[_Layer]:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    with_q = all("q" in group for group in optimizer.param_groups)
    if with_q and q is not None:
        raise ValueError(f"q must be None for {type(optimizer).__name__}, whose groups have it; got {q!r}")
    if model is None:
        layers = _of_optimizer(optimizer) if isinstance(optimizer, SteepestDescent) else []
        if not layers:
            raise ValueError("optimizer must be a SteepestDescent with a parameter at depth > 1 where model is None")
        return layers
    check_optimizer(model, optimizer)
    power = 1.0 if with_q else _check_q(q)
    groups = {parameter: i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
    result = []
    for layer in _of_model(model, power):
        number, *others = (groups.get(factor) for factor in layer.parameters)
        if number is None or any(other != number for other in others):
            raise ValueError(f"the factors of {layer.name} must be in one group of optimizer; they are in several or none")
        result.append(layer._replace(group=number, q=optimizer.param_groups[number]["q"] if with_q else power))
    if not result:
        raise ValueError("model must have factorised weights of depth > 1; it has none")
    return result


def _decay(optimizer: Optimizer, layer: _Layer) -> Any:
    """lr wd of the next step, where (1 - lr wd)^q is what multiplies balance."""
    group = optimizer.param_groups[layer.group]
    lr, decoupled, coupled = group["lr"], group.get("weight_decay", 0.0), group.get("coupled_weight_decay", 0.0)
    if not group.get("decoupled_weight_decay", not isinstance(optimizer, SGD)):
        decoupled, coupled = 0.0, decoupled
    return (lr.double().reshape(()) if isinstance(lr, Tensor) else lr) * (decoupled + coupled if layer.q == 2 else decoupled)


# ---- numbers -----------------------------------------------------------------------------------------------------------------


class _State:
    """What a monitor keeps of a layer: balance at the start, and the product of 1 - lr wd since."""

    def __init__(self, layer: _Layer, coordinates: bool) -> None:
        self.layer = layer
        self.kept: Any = 1.0
        self.first: list[Tensor] | None = None
        self.first_mean, _ = self.measure()
        if coordinates:
            factors = layer.factors()
            dtype = torch.promote_types(factors[0].dtype, torch.float32)
            self.first = [balance.to(dtype) for _, balance in _balances(factors, layer.q)]

    def share(self) -> float:
        """What is left of the balance at the start, by Lemma 4.5."""
        return float(abs(float(self.kept)) ** self.layer.q)

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Mean balance, and the mean distance of the coordinates' from what they should be."""
        factors = self.layer.factors()
        total = torch.zeros(2, dtype=torch.float64, device=factors[0].device)
        kept = self.share()
        for i, (times, balance) in enumerate(_balances(factors, self.layer.q)):
            distance = balance.new_tensor(torch.nan) if self.first is None else (balance - kept * self.first[i].double()).abs()
            total += times * torch.stack([balance.sum(), distance.sum()])
        mean, distance_mean = (total / _count(factors)).tolist()
        return mean, distance_mean


@torch.no_grad()
def _layer_balance(layer: _Layer) -> LayerBalance:
    factors = layer.factors()
    rows = [
        torch.stack([times * balance.sum(), times * balance.abs().sum(), balance.amin(), balance.amax()])
        for times, balance in _balances(factors, layer.q)
        if balance.numel()
    ]
    if not rows:
        return LayerBalance(layer.name, len(factors), layer.q, *[float("nan")] * 4)
    sums, absolute, lowest, highest = torch.stack(rows).unbind(1)
    count = _count(factors)
    numbers = torch.stack([sums.sum() / count, lowest.amin(), highest.amax(), absolute.sum() / count]).tolist()
    return LayerBalance(layer.name, len(factors), layer.q, *numbers)


def _count(factors: Sequence[Tensor]) -> int:
    return (len(factors) - 1) * factors[0].numel()


def _balances(factors: Sequence[Tensor], q: float) -> Iterator[tuple[int, Tensor]]:
    """|w_j|^q - |w_1|^q in float64, a piece at a time, and for how many j it is that."""
    first, *others = factors
    for i, w in enumerate(others):
        if not any(w is before for before in others[:i]):
            times = sum(w is other for other in others)
            for piece, of_first in zip(w.reshape(-1).split(PIECE), first.reshape(-1).split(PIECE), strict=True):
                yield times, _power(piece, q) - _power(of_first, q)


def _power(piece: Tensor, q: float) -> Tensor:
    size = piece.detach().double().abs()
    return size if q == 1 else size**q


@torch.no_grad()
def _pair_balances(model: nn.Module, q: float, pairs: str | Sequence[tuple[str, str]] | None) -> tuple[PairBalance, ...]:
    with _plain(model):
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return tuple(
            PairBalance(layer or "model", q, _norm(parameters, first, q), _norm(parameters, second, q))
            for layer, first, second in _chosen_pairs(parameters, pairs)
        )


def _chosen_pairs(parameters: dict[str, Parameter], pairs: str | Sequence[tuple[str, str]] | None) -> list[Pair]:
    if pairs is None:
        return []
    if isinstance(pairs, str):
        if pairs != "auto":
            raise ValueError(f"pairs must be 'auto', None or a list of (name, name); got {pairs!r}")
        return attention_pairs({name: parameter.shape for name, parameter in parameters.items()})
    result = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"pairs must be 'auto', None or a list of (name, name); got {pair!r} in it")
        for name in pair:
            if name not in parameters or parameters[name].ndim < 2:
                raise ValueError(f"pairs must name matrices of the model; it has none called {name!r}")
        first, second = (whole(name, parameters[name].shape) for name in pair)
        result.append(Pair(f"{first.name}, {second.name}", first, second))
    return result


def _norm(parameters: dict[str, Parameter], part: Part, q: float) -> float:
    matrix = parameters[part.name].narrow(part.dim, part.begin, part.end - part.begin)
    return float(sum(_power(piece, q).sum() for piece in matrix.reshape(-1).split(PIECE)))


def _check_q(q: float | None) -> float:
    if q is None or not is_number(q) or not 1 <= q <= 2:
        raise ValueError(f"q must be a number in [1, 2]; got {q!r}")
    return float(q)
