"""What depth allows: of the options of a group, and of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._ops.options import has_momentum
from ..kernels.number import Betas
from .depth import INITS, STORAGES
from .initial import check_initial, check_weight
from .sharding import local


def check_depth_options(
    *,
    depth: int,
    storage: str,
    init: str,
    scale: float | None,
    q: float,
    betas: Betas,
    coupled_weight_decay: float,
    normalize: bool,
) -> None:
    """Raise ValueError that names the option, its value and what is allowed, also with the others."""
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}; got {storage!r}")
    if init not in INITS:
        random = "; for random factors use pysteep.factorize" if init in ("dwf", "variance") else ""
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}{random}")
    if type(depth) is int and depth == 1:
        return
    check_initial(depth, init, scale, q)
    if normalize:
        raise ValueError(f"normalize must be False at depth > 1; got {normalize!r} at depth {depth}")
    if storage != "implicit":
        return
    if init == "identity":
        raise ValueError(
            "init must be balanced, lambda or saddle with storage 'implicit', which keeps one balance for all coordinates; "
            f"got {init!r}, which gives each its own"
        )
    if has_momentum(betas):
        raise ValueError(f"betas must be (0.0, 0.0) with storage 'implicit', whose factors have no momentum; got {betas!r}")
    if coupled_weight_decay != 0:
        raise ValueError(
            "coupled_weight_decay must be 0 with storage 'implicit': it moves the balance of each coordinate differently; got "
            f"{coupled_weight_decay!r}. At q = 2 weight_decay is the same"
        )


def check_not_shared(name: str, param: Tensor, storage: str) -> None:
    """Raise ValueError if other processes may write to the parameter, which no version counter here would tell."""
    if storage != "implicit" and param.device.type == "cpu" and local(param).is_shared():
        raise ValueError(
            f"storage must be 'implicit' at depth > 1 for {name}, which is in shared memory: a step here would undo what other "
            f"processes wrote to it; got {storage!r}"
        )


def check_depth_param(name: str, param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise ValueError unless the parameter can have factors."""
    if group["depth"] == 1:
        return
    if local(param).is_inference():
        raise ValueError(
            f"depth must be 1 for {name}, which was made in torch.inference_mode(): nothing tells who wrote to it, as its "
            "factors must know. Make it outside, or clone it there"
        )
    check_not_shared(name, param, group["storage"])
    if param.is_complex():
        raise ValueError(f"depth must be 1 for {name}, which is {param.dtype}: a product of factors is real")
    param = local(param)
    if param.layout != torch.strided or is_traceable_wrapper_subclass(param):
        kind = param.layout if param.layout != torch.strided else type(param).__name__
        raise ValueError(f"depth must be 1 for {name}, a {kind}: factors are dense and hold their own memory")
    check_weight(name, param, group["init"], group["scale"])
