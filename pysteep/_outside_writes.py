"""Whether somebody else wrote to a parameter of depth > 1 since its factors last fitted it: told by version counters.

A step that runs as it is notes its parameters' counters when it is done. A compiled step cannot: the compiler copies results
into the parameters after the ops have run. It notes the counters of a parameter and of its first factor when it begins, which
whatever comes after it in the compiled function raises alike; the parameter's alone is raised by others.
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
from ._sharded import mark

if TYPE_CHECKING:
    from .optim import SteepestDescent


@dataclass(slots=True)
class Seen:
    """A parameter at the time when its factors last fitted it."""

    mark: tuple[int, int]
    depth: Depth
    witness_version: int | None  # None: noted when the step was done

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


_optimizers: WeakValueDictionary[int, SteepestDescent] = WeakValueDictionary()
_numbers = count(1)


def numbered(optimizer: SteepestDescent) -> int:
    """The number by which `repair` knows a new optimiser."""
    number = next(_numbers)
    _optimizers[number] = optimizer
    return number


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
