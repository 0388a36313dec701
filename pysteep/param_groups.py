"""Which parameters of a model get depth: groups for an optimiser that say what was chosen."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from ._ops.options import check_depth
from ._selection import Match, choices, computed_from, trainable

logger = logging.getLogger("pysteep")


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for `pysteep.SteepestDescent`; printed, they list each parameter with its depth."""

    def __repr__(self) -> str:
        rows = [(group["depth"], name, param) for group in self for name, param in _named(group)]
        width = max((len(name) for _, name, _ in rows), default=0)
        return "\n".join(
            f"depth {depth:<3} {name:<{width}}  {tuple(param.shape)}{'' if param.requires_grad else '  frozen'}"
            for depth, name, param in rows
        )


def _named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Pairs, which an optimiser that was built of the group has taken apart."""
    return list(zip(group["param_names"], group["params"], strict=True)) if "param_names" in group else group["params"]


def param_groups(model: nn.Module, depth: int, match: Match = None) -> ParamGroups:
    """Two parameter groups of `model`: weights at `depth`, and biases, norms, frozen weights and whatever else at depth 1.

    >>> groups = pysteep.param_groups(model, depth=3)
    >>> print(groups)
    depth 3   0.weight  (32, 64)
    depth 1   0.bias    (32,)
    >>> optimizer = pysteep.SteepestDescent(groups, lr=1e-3)

    Args:
        model: any module. Tied parameters are listed once.
        depth: of the chosen parameters, from 1 to 64.
        match: which. None: `weight` of every nn.Linear, Bilinear, Conv, ConvTranspose, Embedding and EmbeddingBag. A
            shell-style pattern such as "encoder.*": those of them whose full name fits. A function (name, parameter) -> bool:
            any parameters. A weight that torch.nn.utils.prune masks is its `weight_orig`. What other tools compute a weight
            from is at depth 1, and a warning of the logger "pysteep" names it.

    Returns:
        A list of groups, with names, so that the optimiser's `param_groups` hold "param_names". Logged at INFO as "pysteep".
        Frozen parameters (requires_grad=False) are at depth 1, where no step writes to them, and printed as such.

    Raises:
        ValueError: `depth` is out of range, or nothing, nothing but frozen parameters or only a part of a tied parameter was
            chosen.
        TypeError: `match` is none of these, or `model` is no module.
    """
    depth = check_depth(depth)
    kept, _ = trainable(choices(model, match, pruned=True), match)
    chosen = [(choice.places[0].name, choice.parameter) for choice in kept]
    inside = {id(param) for _, param in chosen}
    others = [(name, param) for name, param in model.named_parameters() if id(param) not in inside]
    groups = ParamGroups({"params": params, "depth": deep} for params, deep in ((chosen, depth), (others, 1)) if params)
    logger.info("param_groups:\n%r", groups)
    computed = computed_from(model, (param for _, param in others)) if match is None or isinstance(match, str) else []
    if computed:
        logger.warning(
            "param_groups: depth 1 for %s, from which weights are computed (parametrize, weight_norm, spectral_norm): to give "
            "them depth pass a function as match",
            ", ".join(computed),
        )
    return groups
