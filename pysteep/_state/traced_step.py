"""SteepestDescent.step as torch.compile traces it: one registered op for each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops.options import has_momentum
from .._ops.registered import call_step
from ..kernels.reference.rounding import SIXTEEN
from .cut import check_uncut
from .depth import Depth, compensation_of, momentum_of
from .depth_step import States, fitting
from .groups import step_options
from .memory import Memory
from .rounding import COUNT, begin_count, of_group, places_of


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
    memory: Memory, of_params: States, groups: list[dict[str, Any]], amp: dict[str, Tensor | None], backend: str | None
) -> None:
    """Update every parameter that has a gradient. `amp`: grad_scale, found_inf."""
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
                _step_group(of_params, groups[index], own, owner, amp, backend)
        for group in groups:
            # COUNT, as a literal: for a variable the compiler would guard all keys of the group, and a scheduler adds one.
            if "rounding_step" in group:
                lr = group["lr"]
                rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
                torch.ops.pysteep.count_step(group[COUNT], *rate)


def _step_group(
    of_params: States,
    group: dict[str, Any],
    places: Sequence[int],
    owner: dict[str, Any],
    amp: dict[str, Tensor | None],
    backend: str | None,
) -> None:
    params = [group["params"][i] for i in owner["used"]]
    grads = [param.grad for param in params]
    depth, momentum = Depth.of(group), has_momentum(group["betas"])
    rounding = of_group(group, params, places)
    how: dict[str, Any] = {"rounding": rounding, "streams": rounding.streams, "backend": backend, **owner}
    how["options"] = step_options(group, **amp)

    def stored(*names: str) -> list[Tensor]:
        return [of_params[param][name] for name in names for param in params]

    def compensations(names: list[str], rounded: list[Tensor]) -> list[Tensor]:
        if not depth.compensated:
            return []
        every = [(param, name) for name in names for param in params]
        return [of_params[param][name] for (param, name), own in zip(every, rounded, strict=True) if own.dtype in SIXTEEN]

    if depth.depth > 1 and depth.storage == "implicit":
        call_step("mirror_step", params, grads, stored("balance"), compensations(["compensation"], params), **how)
        return
    if depth.depth == 1:
        momenta = stored("momentum") if momentum else []
        call_step("steepest_step", params, grads, momenta, compensations(["compensation"], params), **how)
        return
    momenta = stored(*depth.keys("momentum")) if momentum else []
    factors = stored(*depth.keys("factor"))
    call_step("factor_step", params, grads, factors, momenta, compensations(depth.keys("compensation"), factors), **how)
