"""The scalar options of a step, in one object from the public signature to the door of a kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numbers import LARGEST, as_integer, check_flags, is_finite, is_number
from ..kernels.number import Betas, Number

MAX_DEPTH = 64  # of factors that are all stored
MAX_TIED_DEPTH = 2**31 - 1


class StepOptions(NamedTuple):
    """What `functional.steepest_step`, `factor_step` and `mirror_step` say of these options; an op reads those that it has."""

    lr: Number
    q: float = 1.0
    betas: Betas = (0.0, 0.0)
    weight_decay: float = 0.0
    coupled_weight_decay: float = 0.0
    normalize: bool = False
    maximize: bool = False
    depth: int = 1
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


def check_options(options: StepOptions) -> None:
    """Raise ValueError or TypeError that names the option, its value and what is allowed. The depth is checked by its op."""
    check_lr(options.lr)
    q = options.q
    if not is_number(q) or not 1 <= q <= 2:
        raise ValueError(f"q must be a number in [1, 2]: 1 is sign descent, 2 gradient descent; got {q!r}")
    check_betas(options.betas)
    _check_nonnegative("weight_decay", options.weight_decay)
    _check_nonnegative("coupled_weight_decay", options.coupled_weight_decay)
    for name in ("normalize", "maximize"):
        if type(getattr(options, name)) is not bool:
            check_flags(**{name: getattr(options, name)})


def check_lr(lr: Number) -> None:
    """Raise ValueError that names lr, its value and what is allowed."""
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        raise ValueError(f"lr must be a finite number >= 0 or a floating-point tensor of one element; got {lr!r}")
    if not (isinstance(lr, Tensor) and torch.compiler.is_compiling()):
        check_rate(lr)


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


def check_depth(depth: int, smallest: int = 1, largest: int = MAX_DEPTH) -> int:
    """The depth as Python's int. Raise ValueError that names the argument, its value and what is allowed."""
    whole = depth if type(depth) is int else as_integer(depth)
    if whole is None or not smallest <= whole <= largest:
        raise ValueError(f"depth must be an int from {smallest} to {largest}; got {depth!r}")
    return whole


def has_momentum(betas: Betas) -> bool:
    """Whether steps keep momenta: unless both betas are the number 0. What a tensor holds may change, so it is not read."""
    beta1, beta2 = betas
    if isinstance(beta1, float) and isinstance(beta2, float):  # told ten times sooner than that they are no tensors
        return beta1 != 0 or beta2 != 0
    return any(isinstance(beta, Tensor) or beta != 0 for beta in betas)


def is_zero(lr: Number) -> bool:
    """Whether the host knows that lr is 0."""
    return (not isinstance(lr, Tensor) or lr.device.type == "cpu") and float(lr) == 0


# ---- at the door of a kernel -------------------------------------------------------------------------------------------------


def is_capturing(device: torch.device) -> bool:
    """Whether what runs on that device now is recorded in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on(value: Number, device: torch.device, name: str) -> Number:
    """A number for the kernels of `device`: read now if that costs no synchronisation with another device, else left there.

    Raises:
        RuntimeError: it is read now, and a CUDA graph that is captured would repeat it for ever.
    """
    if isinstance(value, float):  # asked for first: most are, and it is told soonest
        return value
    if not isinstance(value, Tensor):
        return float(value)
    if value.device.type == "cpu" and is_capturing(device):
        raise RuntimeError(
            f"{name} must be a tensor on {device} or a number when a CUDA graph is captured; got one on {value.device}"
        )
    if device.type == "cpu" or value.device.type == "cpu":
        return float(value)
    value = value.detach().to(device, non_blocking=True).reshape(())
    return value if value.dtype in (torch.float32, torch.float64) else value.double()


def direction_on(options: StepOptions, device: torch.device) -> dict[str, Any]:
    """What a kernel on `device` makes the direction of a step of. NumPy's numbers become Python's: they keep their own type."""
    (beta1, beta2), scale = options.betas, options.grad_scale
    if type(beta1) is not float or type(beta2) is not float:
        beta1, beta2 = on(beta1, device, "betas[0]"), on(beta2, device, "betas[1]")
    return {
        "q": float(options.q),
        "betas": (beta1, beta2),
        "coupled_weight_decay": float(options.coupled_weight_decay),
        "maximize": options.maximize,
        "grad_scale": 1.0 if scale is None else on(scale, device, "grad_scale"),
    }


def step_on(options: StepOptions, device: torch.device) -> dict[str, Any]:
    """What a kernel on `device` takes of the options for a step."""
    given, lr, inf = direction_on(options, device), options.lr, options.found_inf
    given["lr"] = lr if type(lr) is float else on(lr, device, "lr")
    given["weight_decay"] = float(options.weight_decay)
    given["found_inf"] = 0.0 if inf is None else on(inf, device, "found_inf")
    return given
