"""factor_step on any tensors: checks, groups, picks the home and calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..kernels.rounding import NEAREST, Rounding
from .calls import Call, calls
from .dispatch import Choice
from .layout import Role
from .options import StepOptions, step_on
from .rounding import parts
from .steepest_step import chosen, with_gradient


def check_stored(name: str, stored: int, depth: int) -> None:
    """Raise ValueError unless so many factors can stand for `depth`."""
    if stored != depth and not (stored == 2 < depth):
        allowed = f"{depth}, or 2 of which the second stands for factors 2 to {depth}" if depth > 2 else str(depth)
        raise ValueError(f"{name} must be {allowed}; got {stored}")


def prepare(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    factors: Sequence[Sequence[Tensor]],
    momenta: Sequence[Sequence[Tensor]],
    options: StepOptions,
    *,
    backend: Choice,
    rounding: Rounding = NEAREST,
    compensations: Sequence[Sequence[Any]] = (),
    complete: bool = False,
) -> Callable[[], None]:
    """The step as a function to call: every error that the tensors can give is raised here, before anything is written.

    The options are checked already. factors[i] holds what is stored of weight i; `momenta` alike, or empty without momentum;
    `compensations` alike where the rounding is compensated. The lists of `rounding` have an entry for each weight. A gradient
    that is None leaves its weight alone. `complete`: it is known that none is.
    """
    planned: list[Call] = []
    written: list[Tensor] = []
    present: Sequence[int] = range(len(weights)) if complete else with_gradient(gradients)
    for used, of_part in parts([own[0] for own in factors], present, rounding):
        stored = len(factors[used[0]])
        seen: Sequence[Any] = chosen(gradients, used)
        roles = [Role("param", chosen(weights, used), written=True), Role("gradient", seen)]
        roles += _by_factor("factor", chosen(factors, used), stored)
        roles += _by_factor("momentum", chosen(momenta, used), stored) if momenta else []
        compensated = stored if of_part.mode == "compensated" else 0
        if compensated:
            roles += _by_factor("compensation", chosen(compensations, used), stored, torch.int16)

        def arrange(given: list[list[Tensor]], stored: int = stored) -> tuple[Any, ...]:
            return given[0], given[1], given[2 : 2 + stored], given[2 + stored :] or None

        planned += calls("factor_step", roles, backend, arrange, used, of_part, compensated, (stored,))
        for role in roles:
            written += role.tensors if role.written else ()

    def run() -> None:
        for call in planned:
            call.home.factor_step(*call.operands, depth=options.depth, rounding=call.rounding, **step_on(options, call.device))
            call.finish()
        increment_version(written)

    return run


def _by_factor(name: str, tensors: Sequence[Sequence[Tensor]], stored: int, dtype: torch.dtype | None = None) -> list[Role]:
    """A role for each factor that is stored; those of one name have one dtype."""
    alike = "" if dtype else "stored"
    return [
        Role(f"{name} {k + 1} of param", list(map(itemgetter(k), tensors)), written=True, alike=alike, dtype=dtype)
        for k in range(stored)
    ]
