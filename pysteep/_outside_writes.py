"""Whether somebody else wrote to a parameter of depth > 1 since its factors last fitted it: told by version counters.

A step that runs as it is notes its parameters' counters when it is done. A compiled step cannot: the compiler copies results
into the parameters after the ops have run. It notes the counters of a parameter and of its first factor when it begins, which
whatever comes after it in the compiled function raises alike; the parameter's alone is raised by others.

A write through `.data` raises no counter. So a step on a CPU also keeps some elements of one parameter, another one each time,
and the next one compares them. Where they differ every parameter is compared with the product of its factors, from then on at
each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ._depth import ROLES, Depth
from ._sharded import local, mark

if TYPE_CHECKING:
    from .optim import SteepestDescent


SAMPLED = 64  # elements
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sample:
    """Elements spread over a parameter's memory, and what they were when they were noted last."""

    __slots__ = ("_now", "_then")

    def __init__(self, param: Tensor, turn: int) -> None:
        x = local(param.detach())
        apart = max(1, x.numel() // SAMPLED)
        elements = x.as_strided((min(SAMPLED, x.numel()),), (apart,), x.storage_offset() + turn % apart)
        self._now = elements.view(_BITS[x.element_size()])  # NaN equals itself
        self._then = self._now.clone()

    def note(self) -> None:
        self._then.copy_(self._now)

    def changed(self) -> bool:
        return not torch.equal(self._now, self._then)


@dataclass(slots=True)
class Seen:
    """A parameter at the time when its factors last fitted it."""

    mark: tuple[int, int]
    depth: Depth
    witness_version: int | None  # None: noted when the step was done
    sample: Sample | None = None

    @classmethod
    def now(cls, param: Tensor, depth: Depth, witness: Tensor | None = None) -> Seen:
        return cls(mark(param), depth, None if witness is None else witness._version)

    def is_of(self, param: Tensor, witness: Tensor) -> bool:
        """Whether only steps wrote to the parameter since."""
        version, address = self.mark
        steps = 0 if self.witness_version is None else witness._version - self.witness_version
        return mark(param) == (version + steps, address)

    def is_last(self, mark: tuple[int, int], depth: Depth) -> bool:
        """Whether nobody wrote to the parameter, whose mark is given, since a step of this very depth."""
        return self.mark == mark and self.depth is depth and self.witness_version is None


def sampled(seen: Sequence[Seen]) -> Seen:
    """The one of many that has a sample after the step that has just been noted, and before the next."""
    return seen[seen[0].mark[0] % len(seen)]


def sample(params: Sequence[Tensor], seen: Sequence[Seen]) -> None:
    """Note elements of one of the parameters, which a step has written to. On a GPU the host would have to wait for them."""
    turn, own = seen[0].mark[0], sampled(seen)
    if own.sample is not None:
        own.sample.note()
        return
    param = params[turn % len(params)]
    if param.device.type == "cpu" and local(param).numel():
        own.sample = Sample(param, turn)


_optimizers: WeakValueDictionary[int, SteepestDescent] = WeakValueDictionary()
_numbers = count(1)


def numbered(optimizer: SteepestDescent) -> int:
    """The number by which `repair` knows a new optimiser."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


def of_trainable(number: int, index: int, used: Sequence[int], gradients: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients that a compiled step was given, None for each parameter that is frozen now.

    Asked in the op: what the compiler traces has no guard on `requires_grad`. Arguments as of `repair`.
    """
    if not number:
        return gradients
    params = _optimizers[number].param_groups[index]["params"]
    return [grad if params[i].requires_grad else None for i, grad in zip(used, gradients, strict=True)]


@torch.no_grad()
def repair(
    number: int,
    index: int,
    used: Sequence[int],
    weights: Sequence[Tensor],
    factors: Sequence[Sequence[Tensor]],
    momenta: Sequence[Sequence[Tensor]],
    compensations: Sequence[Sequence[Tensor | None]],
) -> None:
    """Make the factors of weights anew where somebody else wrote to these.

    Args:
        number: the optimiser's.
        index: of the parameter group.
        used: which of its parameters the weights are; they may lie elsewhere, as the compiler likes.
        weights: read.
        factors, momenta, compensations: those of each weight that are stored; written.
    """
    optimizer = _optimizers[number]
    group = optimizer.param_groups[index]
    depth = Depth.of(group)
    for i, weight, *stored in zip(used, weights, factors, momenta, compensations, strict=True):
        param = group["params"][i]
        witness = depth.witness(optimizer.state[param])
        seen = optimizer._seen.get(param)
        if seen is None or not seen.is_of(param, witness):
            state = {
                name: tensor
                for role, tensors in zip(ROLES, stored, strict=True)
                for name, tensor in zip(depth.keys(role), tensors, strict=False)  # there may be none of a role
                if tensor is not None
            }
            depth.repair(weight, state, roundings=seen is None)
        optimizer._seen[param] = Seen.now(param, depth, witness)
