"""Which parameters of a model are meant: the weights of its linear maps, those of them that a pattern names, or any others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import ParametrizationList

Match = str | Callable[[str, Parameter], bool] | None

LINEAR_MAPS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
)
"""Modules whose `weight` is chosen where nothing else is asked for: no bias and no normalisation, which nobody wants sparse."""

_HELD = ("weight_g", "weight_v", "weight_orig")
"""What old-style hooks of torch.nn.utils make of a `weight` and compute it from at each call."""


class Place(NamedTuple):
    """Where a parameter is: `module.attribute`, called `name` in the model."""

    module: nn.Module
    attribute: str
    name: str


class Choice(NamedTuple):
    """A parameter and all its places, more than one if it is tied."""

    parameter: Parameter
    places: list[Place]


def choices(model: nn.Module, match: Match = None, *, pruned: bool = False) -> list[Choice]:
    """The chosen parameters of `model` with their places.

    Args:
        model: any module.
        match: None for the weight of each of LINEAR_MAPS; a shell-style pattern for those of them whose full name fits, such as
            "encoder.*"; or a function (name, parameter) -> bool, asked for every parameter, of whatever module.
        pruned: None and patterns mean the parameter, too, of which torch.nn.utils.prune computes a weight: `weight_orig`.

    Raises:
        TypeError: `match` is none of these.
        ValueError: nothing was chosen, or some places of a tied parameter were and others not.
    """
    if not (match is None or isinstance(match, str) or callable(match)):
        raise TypeError(f"match must be a shell-style pattern, a function (name, parameter) -> bool or None; got {match!r}")
    result = []
    for parameter, names in _places(model):
        places: dict[tuple[int, str], Place] = {}
        chosen = set()
        for place in names:  # a module that is used twice gives one place two names
            key = (id(place.module), place.attribute)
            places.setdefault(key, place)
            if is_meant(place, match, parameter, pruned=pruned):
                chosen.add(key)
        if not chosen:
            continue
        if len(chosen) < len(places):
            inside = next(place.name for key, place in places.items() if key in chosen)
            outside = next(place.name for key, place in places.items() if key not in chosen)
            raise ValueError(f"match must choose all places of a tied parameter or none; it chooses {inside} but not {outside}")
        result.append(Choice(parameter, list(places.values())))
    if not result:
        if held := held_by_others(model, match):
            raise ValueError(
                f"match must choose a parameter; {match!r} chooses none, as other tools compute these weights from "
                f"{', '.join(held)}: {HOW_TO_TAKE_THEM}"
            )
        classes = ", ".join(f"nn.{cls.__name__}" for cls in LINEAR_MAPS)
        meant = (
            "a function that chooses other parameters" if match is None or isinstance(match, str) else "one that chooses any"
        )
        raise ValueError(
            f"match must choose a parameter; {match!r} chooses none. None and patterns mean {classes}: pass {meant}"
        )
    return result


def trainable(chosen: list[Choice], match: Match) -> tuple[list[Choice], list[str]]:
    """The choices that require a gradient, and the names of the frozen ones, which nobody writes to.

    Raises:
        ValueError: all are frozen.
    """
    kept = [choice for choice in chosen if choice.parameter.requires_grad]
    frozen = [choice.places[0].name for choice in chosen if not choice.parameter.requires_grad]
    if not kept:
        raise ValueError(
            f"match must choose a parameter that requires a gradient; {match!r} chooses frozen ones alone: {', '.join(frozen)}"
        )
    return kept, frozen


def is_meant(place: Place, match: Match, parameter: Parameter, *, pruned: bool = False) -> bool:
    """Whether `match` chooses this place of `parameter`."""
    if match is None or isinstance(match, str):
        if not isinstance(place.module, LINEAR_MAPS):
            return False
        masked = pruned and place.attribute == "weight_orig" and "weight_mask" in place.module._buffers
        names = [place.name, place.name.removesuffix("_orig")] if masked else [place.name]
        return (masked or place.attribute == "weight") and (match is None or any(fnmatchcase(name, match) for name in names))
    return bool(match(place.name, parameter))


HOW_TO_TAKE_THEM = "undo prune, weight_norm and spectral_norm before, or pass a function as match"


def held_by_others(model: nn.Module, match: Match) -> list[str]:
    """The names of the parameters of which old-style hooks (prune, weight_norm, spectral_norm) compute weights that are meant.

    None and patterns that do not choose them mean the weights; a function is asked for the parameters themselves.
    """
    if not (match is None or isinstance(match, str)):
        return []
    found = []
    for _, places in _places(model):
        module, attribute, name = places[0]
        weight = f"{name.removesuffix(attribute)}weight"
        held = isinstance(module, LINEAR_MAPS) and attribute in _HELD
        if held and (match is None or fnmatchcase(name, match) or fnmatchcase(weight, match)):
            found.append(name)
    return found


def computed_from(model: nn.Module, params: Iterable[Parameter]) -> list[str]:
    """The names of those of the parameters from which a linear map computes its weight: no factors can stand for it."""
    ids = set(map(id, params))
    found = []
    for parameter, places in _places(model):
        module, attribute, name = places[0]
        parametrized = isinstance(module, ParametrizationList) and name.split(".")[-3:-1] == ["parametrizations", "weight"]
        normed = isinstance(module, LINEAR_MAPS) and attribute in _HELD
        if id(parameter) in ids and (parametrized or normed):
            found.append(name)
    return found


def check_model(model: object) -> None:
    """Raise TypeError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def _places(model: nn.Module) -> list[tuple[Parameter, list[Place]]]:
    check_model(model)
    found: dict[int, tuple[Parameter, list[Place]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(id(parameter), (parameter, []))[1].append(Place(module, attribute, name))
    return list(found.values())
