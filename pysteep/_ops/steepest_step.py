"""steepest_step on any tensors: checks, groups, picks the home and calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._numbers import LARGEST, is_finite, is_number
from ..kernels.rounding import NEAREST, Rounding
from .calls import Betas, Call, Number, betas_on, calls, on
from .dispatch import Choice
from .layout import Role
from .rounding import parts


def check_options(
    *,
    lr: Number,
    q: float,
    betas: Betas,
    weight_decay: float,
    coupled_weight_decay: float,
) -> None:
    """Raise ValueError or TypeError that names the option, its value and what is allowed."""
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        raise ValueError(f"lr must be a finite number >= 0 or a floating-point tensor of one element; got {lr!r}")
    if not (isinstance(lr, Tensor) and torch.compiler.is_compiling()):
        check_rate(lr)
    if not is_number(q) or not 1 <= q <= 2:
        raise ValueError(f"q must be a number in [1, 2]: 1 is sign descent, 2 gradient descent; got {q!r}")
    check_betas(betas)
    _check_nonnegative("weight_decay", weight_decay)
    _check_nonnegative("coupled_weight_decay", coupled_weight_decay)


def check_rate(lr: Number) -> None:
    """Raise ValueError unless lr is a finite number >= 0, as far as the host knows."""
    if not isinstance(lr, Tensor):
        _check_nonnegative("lr", lr)
    elif lr.device.type == "cpu" and not 0 <= lr.item() <= LARGEST:
        raise ValueError(f"lr must be a finite number >= 0; got {lr!r}")


def check_betas(betas: Betas) -> None:
    """Raise ValueError unless both are in [0, 1), as far as the host knows."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(map(_is_beta, betas)):
        allowed = "two numbers in [0, 1), or floating-point tensors of one element that hold such numbers"
        raise ValueError(f"betas must be {allowed}; got {betas!r}")


def has_momentum(betas: Betas) -> bool:
    """Whether steps keep momenta: unless both betas are the number 0. What a tensor holds may change, so it is not read."""
    beta1, beta2 = betas
    if isinstance(beta1, float) and isinstance(beta2, float):  # told ten times sooner than that they are no tensors
        return beta1 != 0 or beta2 != 0
    return any(isinstance(beta, Tensor) or beta != 0 for beta in betas)


def _is_beta(value: Any) -> bool:
    if is_number(value):
        return bool(0 <= value < 1)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        return False
    return value.device.type != "cpu" or torch.compiler.is_compiling() or bool(0 <= value.item() < 1)


def _check_nonnegative(name: str, value: float) -> None:
    if type(value) is float and 0 <= value <= LARGEST:  # at each step, and most often so
        return
    if not is_finite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0; got {value!r}")


def prepare(
    weights: list[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: list[Tensor],
    *,
    lr: Number,
    q: float,
    betas: Betas,
    weight_decay: float,
    coupled_weight_decay: float,
    normalize: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
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
    counted = written if owners is None else at(owners, used)
    scale = 1.0 if grad_scale is None else grad_scale
    q, weight_decay = float(q), float(weight_decay)  # a home computes with them, and NumPy's would do so in their own type
    direction: dict[str, Any] = {"q": q, "coupled_weight_decay": float(coupled_weight_decay), "maximize": maximize}

    def run() -> None:
        step_scale: Number = 1.0
        if normalize and q != 2:
            power = _power_sum(planned, scale, betas, direction) if total is None else total()
            step_scale = power ** ((2 - q) / q)  # ||c||_q^(2-q)
        for call in planned:
            call.home.steepest_step(
                *call.operands,
                lr=on(lr, call.device, "lr"),
                weight_decay=weight_decay,
                step_scale=on(step_scale, call.device, "the scale of normalize"),
                grad_scale=on(scale, call.device, "grad_scale"),
                found_inf=0.0 if found_inf is None else on(found_inf, call.device, "found_inf"),
                betas=betas_on(betas, call.device),
                rounding=call.rounding,
                **direction,
            )
            call.finish()
        increment_version(counted)

    return run


DIRECTION = ("q", "betas", "coupled_weight_decay", "maximize", "grad_scale", "backend", "rounding")
"""The options of `prepare` that `power_sum` takes as they are."""


def power_sum(
    weights: list[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: list[Tensor],
    compensations: Sequence[Tensor | None],
    *,
    betas: Betas,
    grad_scale: Tensor | None,
    backend: Choice,
    rounding: Rounding,
    **direction: Any,
) -> Callable[[], Tensor]:
    """sum |c|^q as a function to call, a 0-dim float64 tensor; arguments as of `prepare`."""
    direction |= {name: float(direction[name]) for name in ("q", "coupled_weight_decay")}
    drawn = rounding.mode == "stochastic"  # nothing is stored
    planned, *_ = _plan(weights, gradients, momenta, backend, NEAREST if drawn else rounding, compensations)
    return lambda: _power_sum(planned, 1.0 if grad_scale is None else grad_scale, betas, direction)


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
        seen: Sequence[Any] = present if len(used) == len(present) else at(gradients, used)
        roles = [Role("param", at(weights, used), written=True), Role("gradient", seen)]
        if momenta:
            roles.append(Role("momentum", at(momenta, used), written=True))
        compensated = of_part.mode == "compensated"
        if compensated:
            buffers = [buffer for buffer in at(compensations, used) if buffer is not None]
            roles.append(Role("compensation", buffers, written=True, dtype=torch.int16))
        planned += calls("steepest_step", roles, backend, _arrange, used, of_part, int(compensated))
        for role in roles:
            written += role.tensors if role.written else ()
    return planned, written, indices


Entry = TypeVar("Entry")


def at(entries: Sequence[Entry], indices: Sequence[int]) -> Sequence[Entry]:
    return entries if len(indices) == len(entries) else [entries[i] for i in indices]


def _power_sum(planned: Sequence[Call], scale: Number, betas: Betas, direction: dict[str, Any]) -> Tensor:
    sums = [
        call.home.steepest_power_sum(
            *call.operands,
            grad_scale=on(scale, call.device, "grad_scale"),
            betas=betas_on(betas, call.device),
            rounding=call.rounding,
            **direction,
        )
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
