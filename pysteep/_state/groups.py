"""The options of a parameter group: their names, what is allowed, and what errors call its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .._numbers import LARGEST, as_integer
from .._ops.options import StepOptions, check_betas, check_lr, check_options
from .._ops.rounding import check_rounding
from .depth_checks import check_depth_options
from .rounding import check_state_dtype

_NAMES = tuple(name for name in StepOptions._fields if name not in ("grad_scale", "found_inf"))  # options of a group
OPTIONS = tuple(name for name in _NAMES if name != "depth")
INTEGERS = ("depth", "seed")
ROUNDING = ("rounding", "seed", "state_dtype")
DEPTH = ("depth", "storage", "init", "scale")
_CHECKED = tuple(dict.fromkeys((*_NAMES[1:], *ROUNDING, *DEPTH)))  # all but lr
_RESTRICTED = (*DEPTH, "q", "betas", "coupled_weight_decay", "normalize")  # what depth does not go with at every value
checked_values = itemgetter(*_CHECKED)


def check_group(group: dict[str, Any], known: tuple[Any, ...] | None = None) -> bool:
    """Raise ValueError or TypeError that names the option of a group that is not allowed; make its integers Python's.

    Almost always the values are the very objects of the last step, `known`: `checked_values`, which were found right. lr, which
    schedulers change, is looked at each time, as are tensors, whose values may change.

    Returns:
        Whether the values are others than those known.
    """
    lr = group["lr"]
    if type(lr) is not float or not 0 <= lr <= LARGEST:
        check_lr(lr)
    if torch.compiler.is_compiling():
        _check(group)
        return False
    if known is not None and all(map(is_, known, checked_values(group))):
        if not {float, int}.issuperset(map(type, group["betas"])):
            check_betas(group["betas"])
        return False
    _check(group)
    return True


def _check(group: dict[str, Any]) -> None:
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
    return StepOptions._make((*map(group.__getitem__, _NAMES), grad_scale, found_inf))


def named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The parameters of a group with what errors call them."""
    names = group.get("param_names") or [f"param {i}" for i in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))
