"""SteepestDescent.step as torch.compile traces it: one registered op for each group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._depth import Depth
from ._ops import call_step

if TYPE_CHECKING:
    from .optim import SteepestDescent


def make_state(optimizer: SteepestDescent, index: int, used: tuple[int, ...]) -> int:
    """State for those parameters of a group, made while tracing as torch's own optimisers do; the optimiser's number."""
    group = optimizer.param_groups[index]
    depth, momentum = Depth.of(group), tuple(group["betas"]) != (0.0, 0.0)
    for i in used:
        if depth.depth > 1:
            optimizer._fitting(group["params"][i], depth, momentum=momentum)
        elif momentum:
            optimizer._momentum(group["params"][i])
    return optimizer._number


def allow_tracing() -> None:
    """Have the compiler call `make_state` while it traces. This imports the compiler, as building any optimiser does."""
    torch.compiler.assume_constant_result(make_state)


def traced_step(optimizer: SteepestDescent, closure: Callable[[], Any] | None) -> Any:
    """Update every parameter that has a gradient; returns what `closure` returned."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    of_groups = [[i for i, param in enumerate(group["params"]) if param.grad is not None] for group in optimizer.param_groups]
    # All state first: from its first look at it the compiler takes the dictionary for complete.
    numbers = [make_state(optimizer, index, tuple(used)) for index, used in enumerate(of_groups)]
    # With gradients on, the compiler would copy the parameters after its graph: more memory, and counters of versions that rise
    # otherwise than those of the factors.
    with torch.no_grad():
        for index, used in enumerate(of_groups):
            if used:
                _step_group(optimizer, index, used, numbers[index])
    return loss


def _step_group(optimizer: SteepestDescent, index: int, used: list[int], number: int) -> None:
    group = optimizer.param_groups[index]
    params = [group["params"][i] for i in used]
    grads = [param.grad for param in params]
    depth, momentum = Depth.of(group), tuple(group["betas"]) != (0.0, 0.0)
    options: dict[str, Any] = {name: group[name] for name in ("lr", "q", "weight_decay", "maximize")}
    options |= {name: getattr(optimizer, name, None) for name in ("backend", "grad_scale", "found_inf")}

    def stored(*names: str) -> list[Tensor]:
        return [optimizer.state[param][name] for name in names for param in params]

    if depth.depth > 1 and depth.storage == "implicit":
        call_step("mirror_step", params, grads, stored("balance"), depth=depth.depth, **options)
        return
    options |= {name: group[name] for name in ("betas", "coupled_weight_decay")}
    if depth.depth == 1:
        momenta = stored("momentum") if momentum else []
        call_step("steepest_step", params, grads, momenta, normalize=group["normalize"], **options)
        return
    options |= {"depth": depth.depth, "optimizer": number, "group": index, "used": used}
    momenta = stored(*depth.keys("momentum")) if momentum else []
    call_step("factor_step", params, grads, stored(*depth.keys("factor")), momenta, **options)
