"""The options of a parameter group: their names, what is allowed, and what errors call its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._numbers import as_integer
from .._ops.options import StepOptions, check_options
from .._ops.rounding import check_rounding
from .depth import check_depth_options
from .rounding import check_state_dtype

_NAMES = tuple(name for name in StepOptions._fields if name not in ("grad_scale", "found_inf"))  # options of a group
OPTIONS = tuple(name for name in _NAMES if name != "depth")
INTEGERS = ("depth", "seed")
ROUNDING = ("rounding", "seed", "state_dtype")
DEPTH = ("depth", "storage", "init", "scale")
_RESTRICTED = (*DEPTH, "q", "betas", "coupled_weight_decay", "normalize")  # what depth does not go with at every value


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError that names the option of a group that is not allowed; make its integers Python's."""
    for name in INTEGERS:
        if type(group[name]) is not int:
            whole = as_integer(group[name])
            group[name] = group[name] if whole is None else whole
    check_options(step_options(group))
    check_rounding(group["rounding"], group["seed"])
    check_state_dtype(group["state_dtype"])
    if type(group["depth"]) is not int or (group["depth"], group["storage"], group["init"]) != (1, "tied", "identity"):
        check_depth_options(**{name: group[name] for name in _RESTRICTED})


def step_options(group: Mapping[str, Any], grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> StepOptions:
    """What the ops take of a group's options."""
    return StepOptions(**{name: group[name] for name in _NAMES}, grad_scale=grad_scale, found_inf=found_inf)


def named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The parameters of a group with what errors call them."""
    names = group.get("param_names") or [f"param {i}" for i in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))
