"""State dicts as an optimiser takes them: factors in the storage that it has, tensors in the dtype that they were saved in."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ._depth import Depth, converted
from ._groups import DEPTH, ROUNDING, named
from ._sharded import placed


def converted_state_dict(state_dict: dict[str, Any], own_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict with the depth options of an optimiser's groups, and its factors as these ask for.

    Raises:
        ValueError: depths differ, or the conversion is not exact.
    """
    groups, state = [], dict(state_dict["state"])
    if len(state_dict["param_groups"]) != len(own_groups):
        return state_dict  # torch says so
    for i, (saved, own) in enumerate(zip(state_dict["param_groups"], own_groups, strict=True)):
        if saved.get("depth", 1) != own["depth"]:
            raise ValueError(f"state_dict has depth {saved.get('depth', 1)} in group {i}; this optimiser has {own['depth']}")
        groups.append({**{name: own[name] for name in ROUNDING}, **saved, **{name: own[name] for name in DEPTH}})
        for index, (name, param) in zip(saved["params"], named(own), strict=False):
            if index in state:
                state[index] = placed(name, param, state[index])
                if own["depth"] > 1:
                    state[index] = converted(state[index], Depth.of(own), name)
    return {**state_dict, "state": state, "param_groups": groups}


def keep_dtypes(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Give an optimiser's state the dtypes of the state dict that it has loaded, where torch has cast to the parameter's."""
    saved = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(saved, params, strict=True):
        for name, value in loaded["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.dtype != optimizer.state[param][name].dtype:
                optimizer.state[param][name] = value.to(device=param.device, copy=True)
