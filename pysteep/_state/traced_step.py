"""SteepestDescent.step as torch.compile traces it: one registered op for each group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops.options import has_momentum
from .cut import check_uncut
from .depth import Depth, compensation_of, momentum_of
from .fitting import States, fitting
from .memory import Memory
from .plan import trace_step
from .rounding import COUNT, begin_count, places_of


def make_state(memory: Memory, index: int, used: tuple[int, ...]) -> int:
    """State for those parameters of a group, made while tracing as torch's own optimizers do; the optimizer's number."""
    optimizer = memory.optimizer()
    of_params, group = optimizer.state, optimizer.param_groups[index]
    check_uncut(group)
    depth, momentum = Depth.of(group), has_momentum(group["betas"])
    if COUNT not in group:
        begin_count(group)
    for param in [group["params"][i] for i in used]:
        if depth.depth > 1:
            fitting(memory, of_params, group, param, depth, momentum=momentum)
            continue
        if momentum:
            momentum_of(param, of_params[param], group["state_dtype"])
        if depth.compensated:
            compensation_of(param, of_params[param])
    return memory.number


def allow_tracing() -> None:
    """Have the compiler call `make_state` while it traces. This imports the compiler, as building any optimiser does."""
    torch.compiler.assume_constant_result(make_state)


def traced_step(
    memory: Memory, of_params: States, groups: list[dict[str, Any]], scaling: dict[str, Tensor | None], backend: str | None
) -> None:
    """Update every parameter that has a gradient. `scaling`: grad_scale, found_inf."""
    # Frozen ones too, if they have one: the compiler guards whether there is a gradient, not whether it is asked for.
    of_groups = [[i for i, param in enumerate(group["params"]) if param.grad is not None] for group in groups]
    # All state first: from its first look at it the compiler takes the dictionary for complete.
    numbers = [make_state(memory, index, tuple(used)) for index, used in enumerate(of_groups)]
    # With gradients on, the compiler would copy the parameters after its graph: more memory, and counters of versions that rise
    # otherwise than those of the factors.
    with torch.no_grad():
        places = places_of(groups)
        for index, used in enumerate(of_groups):
            if used:
                owner = {"optimizer": numbers[index], "group": index, "used": used}
                own = [places[index][i] for i in used]
                trace_step(of_params, groups[index], own, owner, scaling, backend)
        for group in groups:
            # COUNT, as a literal: for a variable the compiler would guard all keys of the group, and a scheduler adds one.
            if "rounding_step" in group:
                lr = group["lr"]
                rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
                torch.ops.pysteep.count_step(group[COUNT], *rate)
