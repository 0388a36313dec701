"""The arguments that say how 16-bit weights and factors are rounded, and what they mean for the tensors of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._numbers import as_integer, is_finite
from ..kernels.reference.rounding import SIXTEEN
from ..kernels.rounding import MODES, NEAREST, Rounding


def check_rounding(rounding: str, seed: int) -> int:
    """The seed as Python's int. Raise ValueError or TypeError that names the option, its value and what is allowed."""
    if rounding not in MODES:
        raise ValueError(f"rounding must be one of {', '.join(MODES)}; got {rounding!r}")
    whole = seed if type(seed) is int else as_integer(seed)
    if whole is None or not 0 <= whole < 2**64:
        raise ValueError(f"seed must be an int from 0 to 2^64 - 1; got {seed!r}")
    return whole


def check_step(step: float | Tensor) -> None:
    """Raise ValueError unless `step` can count steps. A tensor on a GPU is not read."""
    if isinstance(step, Tensor):
        if step.numel() != 1 or not step.is_floating_point():
            raise ValueError(
                f"step must be a whole number from 0 to 2^53 - 1 or a floating-point tensor of one element; got {step!r}"
            )
        if step.device.type != "cpu":
            return
        step = step.item()
    if not is_finite(step) or not 0 <= float(step) < 2**53 or step != int(step):
        raise ValueError(f"step must be a whole number from 0 to 2^53 - 1; got {step!r}")


def check_compensation(name: str, compensation: object, narrow: bool) -> None:
    """Raise TypeError unless a tensor of 16 bits, and no other, has a compensation."""
    if narrow and not isinstance(compensation, Tensor):
        raise TypeError(f"{name} must be an int16 tensor beside a tensor of 16 bits; got {compensation!r}")
    if not narrow and compensation is not None:
        raise TypeError(f"{name} must be None beside a tensor of more than 16 bits")


class Part(NamedTuple):
    """Tensors of a call whose rounding asks for the same operands: `indices` into the weights."""

    indices: Sequence[int]
    rounding: Rounding


def parts(stored: Sequence[Tensor], used: Sequence[int], rounding: Rounding) -> Iterator[Part]:
    """Those that have a compensation and those that have none, where there are any; `stored` tells which can have one."""
    if not used:
        return
    if rounding.mode != "compensated":
        yield Part(used, rounding if len(used) == len(stored) else _of(rounding, used))
        return
    narrow = [i for i in used if stored[i].dtype in SIXTEEN]
    wide = [i for i in used if stored[i].dtype not in SIXTEEN]
    if narrow:
        yield Part(narrow, rounding)
    if wide:
        yield Part(wide, NEAREST)


def _of(rounding: Rounding, indices: Sequence[int]) -> Rounding:
    if rounding.mode != "stochastic":
        return rounding
    streams, firsts = ([values[i] for i in indices] for values in (rounding.streams, rounding.firsts))
    return rounding._replace(streams=streams, firsts=firsts)


def as_int16(compensation: Tensor) -> Tensor:
    """A compensation as the ops take it, int16 of the weight's shape, of one as optimizers keep it, uint8 [*shape, 2]."""
    return compensation.view(torch.int16)[..., 0] if compensation.dtype == torch.uint8 else compensation


@torch.no_grad()
def count_step(step: Tensor, lr: float | Tensor) -> None:
    """Count a step, unless it was at lr = 0: torch's distributed checkpoints make state by one, which must leave no trace."""
    step += (lr != 0).reshape(()).to(step) if isinstance(lr, Tensor) else float(lr != 0)
