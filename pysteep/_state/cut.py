"""Parameters that somebody cuts over processes without DTensors: what needs the whole of them is refused by name.

A step is elementwise, so any part of the parameters can be stepped alone. Two options are not: `normalize` takes a norm over
the group, and stochastic rounding counts parameters and elements. DTensors tell how they are cut (`sharding`); the plain
tensors that FSDP1 and ZeroRedundancyOptimizer leave to a rank do not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_REST = "fully_shard and DistributedDataParallel leave parameters of which that is known"
_watched: set[type[Optimizer]] = set()


def _needing_the_whole(group: Mapping[str, Any]) -> tuple[str, str] | None:
    """The option of a group that is not elementwise, with what is allowed, if it has one."""
    if group.get("normalize"):
        return "normalize", "False"
    if group.get("rounding") == "stochastic":
        return "rounding", "'nearest' or 'compensated'"
    return None


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_uncut(group: Mapping[str, Any]) -> None:
    """Raise ValueError that names an option of the group that needs whole parameters where FSDP1 has cut them.

    The mark is that by which FSDP1 knows its own: on its flat parameters and, with use_orig_params, on the views of them.
    """
    needing = _needing_the_whole(group)
    if needing is None or not _is_distributed():
        return
    for i, param in enumerate(group["params"]):
        if "_fsdp_flattened" in param.__dict__:  # looked for at each step: a third of the time of getattr
            option, allowed = needing
            raise ValueError(
                f"{option} must be {allowed} for param {i}, a flat part of FullyShardedDataParallel (FSDP1) of which "
                f"nobody knows the place in the whole; got {group[option]!r}. {_REST}"
            )


def watch_wrappers(kind: type[Optimizer]) -> None:
    """Where there are several processes: from now on check each optimizer that is about to step whether it wraps one of `kind`.

    The wrapped one cannot tell: ZeroRedundancyOptimizer builds it of a part of the parameters, as anybody might.
    """
    if kind not in _watched and _is_distributed() and torch.distributed.get_world_size() > 1:
        _watched.add(kind)
        register_optimizer_step_pre_hook(functools.partial(_check_wrapper, kind))


def _check_wrapper(kind: type[Optimizer], wrapper: Optimizer, *_: Any) -> None:
    """Raise ValueError where ranks have optimizers of `kind` for parts of the wrapper's parameters.

    `optim` and `world_size` are attributes of torch's ZeroRedundancyOptimizer and of FairScale's OSS, of which it was made.
    """
    wrapped = getattr(wrapper, "optim", None)
    if not isinstance(wrapped, kind) or getattr(wrapper, "world_size", 1) == 1:
        return
    for group in wrapper.param_groups:
        needing = _needing_the_whole(group)
        if needing is not None:
            option, allowed = needing
            raise ValueError(
                f"{option} must be {allowed} inside {type(wrapper).__name__}, which leaves each rank a part of the parameters "
                f"and does not say of what; got {group[option]!r}. {_REST}"
            )
