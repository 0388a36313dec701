"""SteepestDescent.step as torch.compile traces it: one registered op for each group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._ops.registered import call_step
from .._ops.steepest_step import has_momentum
from ..kernels.reference.rounding import SIXTEEN
from .clipping import clipping_scale
from .cut import check_uncut
from .depth import Depth
from .depth_step import fitting
from .rounding import COUNT, begin_count, of_group, places_of

if TYPE_CHECKING:
    from ..optim import SteepestDescent


def make_state(optimizer: SteepestDescent, index: int, used: tuple[int, ...]) -> int:
    """State for those parameters of a group, made while tracing as torch's own optimisers do; the optimiser's number."""
    group = optimizer.param_groups[index]
    check_uncut(group)
    depth, momentum = Depth.of(group), has_momentum(group["betas"])
    if COUNT not in group:
        begin_count(group)
    for i in used:
        if depth.depth > 1:
            fitting(optimizer, group["params"][i], depth, momentum=momentum)
            continue
        if momentum:
            optimizer._momentum(group["params"][i], group["state_dtype"])
        if group["rounding"] == "compensated":
            optimizer._compensation(group["params"][i])
    return optimizer._number


def allow_tracing() -> None:
    """Have the compiler call `make_state` while it traces. This imports the compiler, as building any optimiser does."""
    torch.compiler.assume_constant_result(make_state)


def traced_step(
    optimizer: SteepestDescent,
    closure: Callable[[], Any] | None,
    total_norm: float | Tensor | None,
    max_norm: float | None,
) -> Any:
    """Update every parameter that has a gradient; returns what `closure` returned."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    # Frozen ones too, if they have one: the compiler guards whether there is a gradient, not whether it is asked for.
    of_groups = [[i for i, param in enumerate(group["params"]) if param.grad is not None] for group in optimizer.param_groups]
    # All state first: from its first look at it the compiler takes the dictionary for complete.
    numbers = [make_state(optimizer, index, tuple(used)) for index, used in enumerate(of_groups)]
    # With gradients on, the compiler would copy the parameters after its graph: more memory, and counters of versions that rise
    # otherwise than those of the factors.
    with torch.no_grad():
        scale = getattr(optimizer, "grad_scale", None)
        if total_norm is not None and max_norm is not None:
            scale = clipping_scale(total_norm, max_norm, scale)
        places = places_of(optimizer.param_groups)
        for index, used in enumerate(of_groups):
            if used:
                _step_group(optimizer, index, used, [places[index][i] for i in used], numbers[index], scale)
        for group in optimizer.param_groups:
            # COUNT, as a literal: for a variable the compiler would guard all keys of the group, and a scheduler adds one.
            if "rounding_step" in group:
                lr = group["lr"]
                rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
                torch.ops.pysteep.count_step(group[COUNT], *rate)
    return loss


def _step_group(
    optimizer: SteepestDescent, index: int, used: list[int], places: list[int], number: int, grad_scale: Tensor | None
) -> None:
    group = optimizer.param_groups[index]
    params = [group["params"][i] for i in used]
    grads = [param.grad for param in params]
    depth, momentum = Depth.of(group), has_momentum(group["betas"])
    options: dict[str, Any] = {name: group[name] for name in ("lr", "q", "weight_decay", "maximize")}
    options |= {name: getattr(optimizer, name, None) for name in ("backend", "found_inf")}
    rounding = of_group(group, params, places)
    options |= {"grad_scale": grad_scale, "rounding": rounding, "streams": rounding.streams}
    options |= {"optimizer": number, "group": index, "used": used}

    def stored(*names: str) -> list[Tensor]:
        return [optimizer.state[param][name] for name in names for param in params]

    def compensations(names: list[str], rounded: list[Tensor]) -> list[Tensor]:
        if not depth.compensated:
            return []
        every = [(param, name) for name in names for param in params]
        return [optimizer.state[param][name] for (param, name), own in zip(every, rounded, strict=True) if own.dtype in SIXTEEN]

    if depth.depth > 1 and depth.storage == "implicit":
        call_step(
            "mirror_step",
            params,
            grads,
            stored("balance"),
            compensations(["compensation"], params),
            depth=depth.depth,
            **options,
        )
        return
    options |= {name: group[name] for name in ("betas", "coupled_weight_decay")}
    if depth.depth == 1:
        momenta = stored("momentum") if momentum else []
        own = compensations(["compensation"], params)
        call_step("steepest_step", params, grads, momenta, own, normalize=group["normalize"], **options)
        return
    options["depth"] = depth.depth
    momenta = stored(*depth.keys("momentum")) if momentum else []
    factors = stored(*depth.keys("factor"))
    own = compensations(depth.keys("compensation"), factors)
    call_step("factor_step", params, grads, factors, momenta, own, **options)
