"""State dicts as torch's checkpoints want them, and as an optimizer takes them: of its own kind, in the storage that it has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .depth import Depth, converted, role_of, widen
from .groups import DEPTH, OPTIONS, ROUNDING, check_group, named
from .rounding import COUNT, check_compensation_fits
from .sharding import placed

PLACEHOLDER = "placeholder"
"""Entry of a state dict alone, for a parameter of which nothing else but numbers is saved."""

_OURS = frozenset((*OPTIONS, *ROUNDING, *DEPTH)) - {"lr", "betas", "weight_decay", "maximize"}  # nobody else's


def with_entries(state_dict: dict[str, Any], own_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict with an entry for each parameter that requires a gradient, as torch.distributed.checkpoint wants them.

    Each has a tensor of a dimension or more, by which torch tells the device of a state that it broadcasts. Only a shard of
    FullyShardedDataParallel, which takes such tensors for shards, gets none.
    """
    state = dict(state_dict["state"])
    for index, param in _numbered(state_dict, own_groups):
        own = state.get(index, {})
        sized = any(isinstance(value, Tensor) and value.ndim > 0 for value in own.values())
        if param.requires_grad and not sized and not getattr(param, "_fsdp_flattened", False):
            state[index] = {**own, PLACEHOLDER: torch.zeros(1, device=param.device)}
    return {**state_dict, "state": state}


def converted_state_dict(state_dict: dict[str, Any], own_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict with the options that it lacks of an optimizer's groups, their depth, and factors and dtypes as they ask.

    Raises:
        TypeError, ValueError: it is no state dict, or another optimizer's; an option is not allowed; depths or shapes differ;
            the conversion is not exact.
    """
    _check_kind(state_dict)
    groups, state = [], {index: _without_placeholder(own) for index, own in state_dict["state"].items()}
    state = {index: own for index, own in state.items() if own}
    if len(state_dict["param_groups"]) != len(own_groups):
        return state_dict  # torch says so
    for i, (saved, own) in enumerate(zip(state_dict["param_groups"], own_groups, strict=True)):
        if saved.get("depth", 1) != own["depth"]:
            raise ValueError(f"state_dict has depth {saved.get('depth', 1)} in group {i}; this optimiser has {own['depth']}")
        for index, (name, param) in zip(saved["params"], named(own), strict=False):
            if index in state:
                _check_state(name, param, state[index])
                state[index] = placed(name, param, state[index])
                if own["depth"] > 1:
                    state[index] = converted(state[index], Depth.of(own), name)
        groups.append(group := _completed(i, saved, own))
        for index, (name, param) in zip(saved["params"], named(own), strict=False):
            if index in state:
                if "compensation" in state[index] and group["rounding"] == "compensated":
                    check_compensation_fits(name, param, f"del state_dict['state'][{index!r}]")
                buffers = [key for key in state[index] if role_of(key) in ("factor", "momentum")]
                widen(param, state[index], buffers, group["state_dtype"])
    return {**state_dict, "state": state, "param_groups": groups}


def keep_dtypes(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Give an optimizer's state the dtypes of the state dict that it has loaded, where torch has cast to the parameter's."""
    for index, param in _numbered(loaded, optimizer.param_groups):
        for name, value in loaded["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.dtype != optimizer.state[param][name].dtype:
                optimizer.state[param][name] = value.to(device=param.device, copy=True)


def _numbered(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[tuple[Any, Tensor]]:
    """Each parameter with what the state dict calls it."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    return zip(saved, chain.from_iterable(group["params"] for group in groups), strict=True)


def _without_placeholder(state: Any) -> Any:
    return {name: value for name, value in state.items() if name != PLACEHOLDER} if isinstance(state, dict) else state


def check_is_state_dict(state_dict: Any) -> None:
    """Raise TypeError unless it looks like an optimizer's."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        got = f"keys {[*state_dict]}" if isinstance(state_dict, dict) else f"a {type(state_dict).__name__}"
        raise TypeError(f"state_dict must be a dict with 'state' and 'param_groups', as SteepestDescent's; got {got}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise TypeError(f"'state' of state_dict must be a dict of each parameter's state; got {state!r}")
    if not isinstance(groups, (list, tuple)):
        raise TypeError(f"'param_groups' of state_dict must be a list of dicts; got {groups!r}")
    for i, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
            got = f"keys {[*group]}" if isinstance(group, dict) and "params" not in group else repr(group)
            raise TypeError(f"group {i} of state_dict must be a dict with a list of numbers as 'params'; got {got}")
        for index in group["params"]:
            if not isinstance(own := state.get(index, {}), dict):
                raise TypeError(f"state_dict must hold the state of parameter {index} as a dict; got {own!r}")


def _check_kind(state_dict: dict[str, Any]) -> None:
    check_is_state_dict(state_dict)
    for i, group in enumerate(state_dict["param_groups"]):
        if not _OURS & group.keys():
            options = ", ".join(name for name in group if name != "params")
            raise ValueError(
                f"state_dict must be a SteepestDescent's, whose groups have q; group {i} of this one has {options}: it is of "
                "another optimizer"
            )


def _completed(i: int, saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A group of a state dict with every option, checked."""
    group = {**{name: own[name] for name in (*OPTIONS, *ROUNDING)}, **saved, **{name: own[name] for name in DEPTH}}
    if COUNT not in group and isinstance(group.get("step"), Tensor):  # the name that it had at first
        group[COUNT] = group.pop("step")
    try:
        check_group(group)
    except (TypeError, ValueError) as error:
        raise type(error)(f"group {i} of state_dict: {error}") from None
    return group


def _check_state(name: str, param: Tensor, state: dict[str, Any]) -> None:
    """Raise ValueError that names the first entry that cannot be the parameter's."""
    for key, value in state.items():
        role = role_of(key)
        if role is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict must hold {key} of {name} as a tensor; got a {type(value).__name__}")
        if role == "balance":
            if value.numel() != 1 or not 0 <= float(value) < math.inf:
                raise ValueError(f"state_dict must hold balance of {name} as one finite number >= 0; got {value}")
            continue
        expected = (*param.shape, 2) if role == "compensation" else tuple(param.shape)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"state_dict must hold {key} of {name} in shape {expected}, its parameter being {tuple(param.shape)}; "
                f"got {tuple(value.shape)}"
            )
        if (value.dtype != torch.uint8) if role == "compensation" else not (value.is_floating_point() or value.is_complex()):
            raise ValueError(
                f"state_dict must hold {key} of {name} in a floating dtype, a compensation in uint8; got {value.dtype}"
            )
