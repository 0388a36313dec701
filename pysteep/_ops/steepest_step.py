"""steepest_step on any tensors: checks, groups, picks the home and calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..kernels.number import Number
from ..kernels.rounding import NEAREST, Rounding
from .calls import Call, calls
from .dispatch import Choice
from .layout import Role
from .options import StepOptions, direction_on, on, step_on
from .rounding import parts


def prepare(
    weights: list[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: list[Tensor],
    options: StepOptions,
    *,
    backend: Choice,
    rounding: Rounding = NEAREST,
    compensations: Sequence[Tensor | None] = (),
    total: Callable[[], Tensor] | None = None,
    owners: list[Tensor] | None = None,
    complete: bool = False,
) -> Callable[[], None]:
    """The step as a function to call: every error that the tensors can give is raised here, before anything is written.

    The options are checked already. `momenta` is empty without momentum; a gradient that is None leaves its weight alone. The
    lists of `rounding` and, if compensated, `compensations` have an entry for each weight. `total` is the power sum of
    `normalize`, where these are not all tensors of which it is taken. `owners` are the tensors whose versions count the write,
    where weights and momenta are parts of others. `complete`: it is known that no gradient is None.
    """
    planned, written, used = _plan(weights, gradients, momenta, backend, rounding, compensations, complete)
    counted = written if owners is None else chosen(owners, used)

    def run() -> None:
        step_scale: Number = 1.0
        q = float(options.q)  # NumPy's would compute in its own type
        if options.normalize and q != 2:
            power = _power_sum(planned, options) if total is None else total()
            step_scale = power ** ((2 - q) / q)  # ||c||_q^(2-q)
        for call in planned:
            call.home.steepest_step(
                *call.operands,
                step_scale=step_scale if type(step_scale) is float else on(step_scale, call.device, "the scale of normalize"),
                rounding=call.rounding,
                **step_on(options, call.device),
            )
            call.finish()
        increment_version(counted)

    return run


def power_sum(
    weights: list[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: list[Tensor],
    compensations: Sequence[Tensor | None],
    options: StepOptions,
    *,
    backend: Choice,
    rounding: Rounding,
) -> Callable[[], Tensor]:
    """sum |c|^q as a function to call, a 0-dim float64 tensor; arguments as of `prepare`."""
    drawn = rounding.mode == "stochastic"  # nothing is stored
    planned, *_ = _plan(weights, gradients, momenta, backend, NEAREST if drawn else rounding, compensations)
    return lambda: _power_sum(planned, options)


def _plan(
    weights: list[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: list[Tensor],
    backend: Choice,
    rounding: Rounding,
    compensations: Sequence[Tensor | None],
    complete: bool = False,
) -> tuple[list[Call], list[Tensor], Sequence[int]]:
    """The calls that serve the weights that have a gradient, the tensors that they write to, and the indices of the weights."""
    planned: list[Call] = []
    written: list[Tensor] = []
    present = gradients if complete else [gradient for gradient in gradients if gradient is not None]
    indices = with_gradient(gradients) if len(present) < len(weights) else range(len(weights))  # most often, and soon told
    for used, of_part in parts(weights, indices, rounding):
        seen: Sequence[Any] = present if len(used) == len(present) else chosen(gradients, used)
        roles = [Role("param", chosen(weights, used), written=True), Role("gradient", seen)]
        if momenta:
            roles.append(Role("momentum", chosen(momenta, used), written=True))
        compensated = of_part.mode == "compensated"
        if compensated:
            buffers = [buffer for buffer in chosen(compensations, used) if buffer is not None]
            roles.append(Role("compensation", buffers, written=True, dtype=torch.int16))
        planned += calls("steepest_step", roles, backend, _arrange, used, of_part, int(compensated))
        for role in roles:
            written += role.tensors if role.written else ()
    return planned, written, indices


Entry = TypeVar("Entry")


def chosen(entries: Sequence[Entry], indices: Sequence[int]) -> Sequence[Entry]:
    """The entries at the indices; if these are all, the very sequence."""
    return entries if len(indices) == len(entries) else [entries[i] for i in indices]


def _power_sum(planned: Sequence[Call], options: StepOptions) -> Tensor:
    sums = [
        call.home.steepest_power_sum(*call.operands, rounding=call.rounding, **direction_on(options, call.device))
        for call in planned
    ]
    if not sums:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([value.to(sums[0].device) for value in sums]).sum()


def with_gradient(gradients: Sequence[Tensor | None]) -> list[int]:
    """The indices of the gradients that are there."""
    return [i for i, gradient in enumerate(gradients) if gradient is not None]


def _arrange(roles: list[list[Tensor]]) -> tuple[Any, ...]:
    return (*roles, None) if len(roles) == 2 else tuple(roles)
