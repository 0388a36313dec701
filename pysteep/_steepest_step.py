"""steepest_step on any tensors: checks, groups, picks the home and calls it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ._dispatch import choose, extension
from ._layout import buckets

if extension is not None:
    from ._native.steepest_step import run_steepest_power_sum, run_steepest_step
    from ._native.tensors import plain

Number = float | Tensor


def check_options(
    *,
    lr: Number,
    q: float,
    betas: tuple[float, float],
    weight_decay: float,
    coupled_weight_decay: float,
) -> None:
    """Raise ValueError or TypeError that names the option, its value and what is allowed."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"lr must be a number >= 0 or a floating-point tensor of one element; got {lr!r}")
        if lr.device.type == "cpu" and not torch.compiler.is_compiling() and not lr.item() >= 0:
            raise ValueError(f"lr must be >= 0; got {lr!r}")
    else:
        _check_nonnegative("lr", lr)
    if not _is_number(q) or not 1 <= q <= 2:
        raise ValueError(f"q must be a number in [1, 2]: 1 is sign descent, 2 gradient descent; got {q!r}")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(map(_is_beta, betas)):
        raise ValueError(f"betas must be two numbers in [0, 1); got {betas!r}")
    _check_nonnegative("weight_decay", weight_decay)
    _check_nonnegative("coupled_weight_decay", coupled_weight_decay)


def _is_number(value: object) -> bool:
    return isinstance(value, (float, int, Real))  # in this order: Real alone takes microseconds


def _is_beta(value: float) -> bool:
    return _is_number(value) and 0 <= value < 1


def _check_nonnegative(name: str, value: float) -> None:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0; got {value!r}")


@dataclass
class _Call:
    """What one call of a home updates: its two functions, the tensors already given."""

    device: torch.device
    step: Callable[..., None]
    power_sum: Callable[..., Tensor]
    finish: Callable[[], None] = lambda: None


def _calls(weights: list[Tensor], gradients: list[Tensor | None], momenta: list[Tensor], backend: str | None) -> list[_Call]:
    if extension is not None and backend in (None, "cpp", "cuda"):
        tensors = plain(weights, gradients, momenta)
        if tensors is not None:
            device = torch.device("cuda", tensors.device_index) if tensors.on_cuda else torch.device("cpu")
            if choose(backend, device.type).name in ("cpp", "cuda"):
                return [_Call(device, partial(run_steepest_step, tensors), partial(run_steepest_power_sum, tensors))]
    calls = []
    for bucket in buckets(weights, gradients, momenta or None):
        home = choose(backend, bucket.device.type).home("steepest_step")
        operands = (bucket.weights, bucket.gradients, bucket.momenta)
        calls.append(
            _Call(
                bucket.device,
                partial(home.steepest_step, *operands),
                partial(home.steepest_power_sum, *operands),
                bucket.finish,
            )
        )
    return calls


def _on(value: Number, device: torch.device) -> Number:
    """A number for the kernels of `device`: read now if that costs no synchronisation with another device, else left there."""
    if not isinstance(value, Tensor):
        return float(value)
    if device.type == "cpu" or value.device.type == "cpu":
        return float(value)
    value = value.detach().to(device, non_blocking=True)
    return value if value.dtype in (torch.float32, torch.float64) else value.double()


def prepare(
    weights: list[Tensor],
    gradients: list[Tensor | None],
    momenta: list[Tensor],
    *,
    lr: Number,
    q: float,
    betas: tuple[float, float],
    weight_decay: float,
    coupled_weight_decay: float,
    normalize: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None,
) -> Callable[[], None]:
    """The step as a function to call: every error that the tensors can give is raised here, before anything is written.

    The options are checked already. `momenta` is empty without momentum; a gradient that is None leaves its weight alone.
    """
    updated = weights
    if any(gradient is None for gradient in gradients):
        updated = [weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]
    calls = _calls(weights, gradients, momenta, backend)
    scale = 1.0 if grad_scale is None else grad_scale
    direction: dict[str, Any] = {"q": q, "betas": betas, "coupled_weight_decay": coupled_weight_decay, "maximize": maximize}

    def run() -> None:
        step_scale: Number = 1.0
        if normalize and q != 2 and calls:
            device = calls[0].device
            sums = [call.power_sum(grad_scale=_on(scale, call.device), **direction).to(device) for call in calls]
            step_scale = torch.stack(sums).sum() ** ((2 - q) / q)  # ||c||_q^(2-q)
        for call in calls:
            call.step(
                lr=_on(lr, call.device),
                weight_decay=weight_decay,
                step_scale=_on(step_scale, call.device),
                grad_scale=_on(scale, call.device),
                found_inf=0.0 if found_inf is None else _on(found_inf, call.device),
                **direction,
            )
            call.finish()
        increment_version(updated)
        if momenta:
            increment_version(momenta)

    return run
