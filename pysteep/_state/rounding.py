"""What rounding adds to an optimiser: the compensations as its state, and which random numbers belong to which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .._ops.rounding import as_int16
from ..kernels.reference.rounding import SIXTEEN
from ..kernels.rounding import NEAREST, Rounding
from .sharding import check_consecutive, first_elements, like, local

COMPENSATED = Rounding("compensated")
COUNT = "rounding_step"  # of a group's steps, in the group. "step" is what wrappers of optimizers keep there.


def add_compensation(param: Tensor, state: dict[str, Any], name: str, rounded: Tensor) -> None:
    """A buffer of zeros for a parameter or factor of 16 bits: uint8 [*its shape, 2], two bytes an element in its memory order.

    Not int16, which torch's communication libraries do not carry.

    Raises:
        ValueError: there is one, but what it compensates is wider now.
    """
    if rounded.dtype not in SIXTEEN:
        if name in state:
            check_compensation_fits(f"a parameter of shape {tuple(param.shape)}", rounded, "del optimizer.state[param]")
        return
    if name in state:
        return
    own = torch.empty_like(local(rounded), memory_format=torch.preserve_format)
    strides = (*(2 * stride for stride in own.stride()), 1)
    buffer = torch.empty_strided((*own.shape, 2), strides, dtype=torch.uint8, device=own.device)
    state[name] = like(param, buffer.zero_())


def check_compensation_fits(name: str, param: Tensor, entry: str) -> None:
    """Raise ValueError unless the parameter is of 16 bits, to which a compensation belongs; `entry` tells how to drop that."""
    if param.dtype not in SIXTEEN:
        raise ValueError(
            f"{name} must be of 16 bits, as its compensation holds the bits that follow them; it is {param.dtype} now. To do "
            f"without those bits: {entry}['compensation']"
        )


def int16_of(state: Mapping[str, Any], name: str) -> Tensor | None:
    """A buffer of `add_compensation` as the ops take it, if there is one: int16, of the shape of what it compensates."""
    return as_int16(local(state[name])) if name in state else None


def rounding_of(group: Mapping[str, Any], params: Sequence[Tensor], places: Sequence[int]) -> Rounding:
    """That of a parameter group, for those of its parameters; `places`, theirs in the optimizer, are their streams."""
    mode = group["rounding"]
    if mode != "stochastic":
        return NEAREST if mode == "nearest" else COMPENSATED
    return Rounding(mode, group["seed"], group[COUNT], list(places), first_elements(params))


def places_of(groups: Sequence[Mapping[str, Any]]) -> list[range]:
    """The places in an optimizer of the parameters of each of its groups, one after another."""
    ends = list(accumulate(len(group["params"]) for group in groups))
    return [range(end - len(group["params"]), end) for group, end in zip(groups, ends, strict=True)]


def check_state_dtype(state_dtype: torch.dtype | None) -> None:
    """Raise ValueError that names the option, its value and what is allowed."""
    if state_dtype not in (None, torch.float32):
        raise ValueError(f"state_dtype must be None, the parameter's, or torch.float32; got {state_dtype!r}")


def check_rounded_param(name: str, param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise ValueError unless the group's options can be the parameter's."""
    if group["state_dtype"] is not None and param.dtype in (torch.float64, torch.complex128):
        raise ValueError(f"state_dtype must be None for {name}, which is {param.dtype}; got {group['state_dtype']}")
    if group["rounding"] == "stochastic":
        check_consecutive(name, param)


def begin_count(group: dict[str, Any]) -> None:
    """Have the group count its steps, where random numbers depend on them, on the device: a CUDA graph counts there too."""
    if group["rounding"] == "stochastic" and group["params"]:
        step = group.get(COUNT, torch.zeros((), dtype=torch.float64, device="cpu"))
        group[COUNT] = step.to(group["params"][0].device, copy=True)  # not that of an optimiser whose group was copied
