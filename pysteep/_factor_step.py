"""factor_step on any tensors: checks, groups, picks the home and calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from ._calls import Number, calls, on
from ._factor_product import MAX_DEPTH
from ._layout import Role
from ._steepest_step import with_gradient


def check_depth(depth: int, *, tied: bool = False) -> None:
    """Raise ValueError that names the argument, its value and what is allowed."""
    allowed = "an int from 2 up" if tied else f"an int from 1 to {MAX_DEPTH}"
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1 or (depth > MAX_DEPTH and not tied):
        raise ValueError(f"depth must be {allowed}; got {depth!r}")


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
    *,
    depth: int,
    lr: Number,
    q: float,
    betas: tuple[float, float],
    weight_decay: float,
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None,
) -> Callable[[], None]:
    """The step as a function to call: every error that the tensors can give is raised here, before anything is written.

    The options are checked already. factors[i] holds what is stored of weight i; `momenta` alike, or empty without momentum. A
    gradient that is None leaves its weight alone.
    """
    used = with_gradient(gradients)
    if not used:
        return lambda: None
    stored = len(factors[used[0]])
    by_index = [[factors[i][k] for i in used] for k in range(stored)]
    buffers = [[momenta[i][k] for i in used] for k in range(stored)] if momenta else []
    params, seen = [weights[i] for i in used], [gradient for gradient in gradients if gradient is not None]
    roles = [
        Role("param", params, written=True),
        Role("gradient", seen),
        *(Role(f"factor {k + 1} of param", tensors, written=True, alike="stored") for k, tensors in enumerate(by_index)),
        *(Role(f"momentum {k + 1} of param", tensors, written=True, alike="stored") for k, tensors in enumerate(buffers)),
    ]

    def arrange(given: list[list[Tensor]]) -> tuple[Any, ...]:
        return given[0], given[1], given[2 : 2 + stored], given[2 + stored :] or None

    planned = calls("factor_step", roles, backend, arrange, used)
    scale = 1.0 if grad_scale is None else grad_scale

    def run() -> None:
        for call in planned:
            call.home.factor_step(
                *call.operands,
                depth=depth,
                lr=on(lr, call.device),
                q=q,
                betas=betas,
                weight_decay=weight_decay,
                coupled_weight_decay=coupled_weight_decay,
                maximize=maximize,
                grad_scale=on(scale, call.device),
                found_inf=0.0 if found_inf is None else on(found_inf, call.device),
            )
            call.finish()
        for written in (params, *by_index, *buffers):
            increment_version(written)

    return run
