"""What an optimizer remembers between its steps, beside its state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._ops.registered import add_owner
from .depth import ROLES, Depth
from .writes import Snapshot


class Memory:
    """Of one optimizer. A compiled step asks it, by its number, what the compiler cannot guard: `_ops.registered.Owner`.

    Attributes:
        snapshots: each parameter of depth > 1 at the time when its factors last fitted it.
        checked: by the id of each of its groups, option values that were found right for the group and its parameters.
        writes_uncounted: whether somebody wrote to such a parameter through `.data`, as may happen again.
        steps: how many steps were taken.
        number: what the registered ops know the optimizer by.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)
        self.snapshots: dict[Tensor, Snapshot] = {}
        self.checked: dict[int, tuple[Any, ...]] = {}
        self.writes_uncounted = False
        self.steps = 0
        self.number = add_owner(self)

    def note(self, param: Tensor, depth: Depth) -> None:
        """That the factors of a parameter fit it now. The samples of one that nobody wrote to stay those of its last step."""
        before, now = self.snapshots.get(param), Snapshot.now(param, depth)
        if before is not None and before.mark == now.mark:
            now.samples = before.samples
        self.snapshots[param] = now

    def trainable(self, group: int, used: Sequence[int], gradients: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """See `_ops.registered.Owner`."""
        params = self.optimizer().param_groups[group]["params"]
        return [grad if params[i].requires_grad else None for i, grad in zip(used, gradients, strict=True)]

    @torch.no_grad()
    def repair(
        self,
        group: int,
        used: Sequence[int],
        weights: Sequence[Tensor],
        factors: Sequence[Sequence[Tensor]],
        momenta: Sequence[Sequence[Tensor]],
        compensations: Sequence[Sequence[Tensor | None]],
    ) -> None:
        """See `_ops.registered.Owner`."""
        optimizer = self.optimizer()
        options = optimizer.param_groups[group]
        depth = Depth.of(options)
        for i, weight, *stored in zip(used, weights, factors, momenta, compensations, strict=True):
            param = options["params"][i]
            witness = depth.witness(optimizer.state[param])
            seen = self.snapshots.get(param)
            if seen is None or not seen.is_of(param, witness):
                state = {
                    name: tensor
                    for role, tensors in zip(ROLES, stored, strict=True)
                    for name, tensor in zip(depth.keys(role), tensors, strict=False)  # there may be none of a role
                    if tensor is not None
                }
                depth.repair(weight, state, roundings=seen is None)
            self.snapshots[param] = Snapshot.now(param, depth, witness)

    def optimizer(self) -> Optimizer:
        """Whose memory it is."""
        optimizer = self._optimizer()
        assert optimizer is not None, "it holds this memory"
        return optimizer
