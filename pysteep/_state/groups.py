"""The options of a parameter group: their names, what is allowed, and what errors call its parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._numbers import as_integer, check_flags
from .._ops.rounding import check_rounding
from .._ops.steepest_step import check_options
from .depth import check_depth_options
from .rounding import check_state_dtype

NUMERIC = ("lr", "q", "betas", "weight_decay", "coupled_weight_decay")
OPTIONS = (*NUMERIC, "normalize", "maximize")
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
    check_options(
        lr=group["lr"],
        q=group["q"],
        betas=group["betas"],
        weight_decay=group["weight_decay"],
        coupled_weight_decay=group["coupled_weight_decay"],
    )
    if type(group["normalize"]) is not bool or type(group["maximize"]) is not bool:
        check_flags(normalize=group["normalize"], maximize=group["maximize"])
    check_rounding(group["rounding"], group["seed"])
    check_state_dtype(group["state_dtype"])
    if type(group["depth"]) is not int or (group["depth"], group["storage"], group["init"]) != (1, "tied", "identity"):
        check_depth_options(**{name: group[name] for name in _RESTRICTED})


def named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The parameters of a group with what errors call them."""
    names = group.get("param_names") or [f"param {i}" for i in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))
