"""Which parameters of a model are meant: the weights of its linear maps, those of them that a pattern names, or any others."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn import Parameter

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


class Place(NamedTuple):
    """Where a parameter is: `module.attribute`, called `name` in the model."""

    module: nn.Module
    attribute: str
    name: str


class Choice(NamedTuple):
    """A parameter and all its places, more than one if it is tied."""

    parameter: Parameter
    places: list[Place]


def selected(model: nn.Module, match: Match = None) -> list[tuple[str, Parameter]]:
    """The chosen parameters by name, each once, in the order of `model.named_parameters()`. Arguments and errors: `choices`."""
    return [(choice.places[0].name, choice.parameter) for choice in choices(model, match)]


def choices(model: nn.Module, match: Match = None) -> list[Choice]:
    """The chosen parameters of `model` with their places.

    Args:
        model: any module.
        match: None for the weight of each of LINEAR_MAPS; a shell-style pattern for those of them whose full name fits, such as
            "encoder.*"; or a function (name, parameter) -> bool, asked for every parameter, of whatever module.

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
            if is_meant(place, match, parameter):
                chosen.add(key)
        if not chosen:
            continue
        if len(chosen) < len(places):
            inside = next(place.name for key, place in places.items() if key in chosen)
            outside = next(place.name for key, place in places.items() if key not in chosen)
            raise ValueError(f"match must choose all places of a tied parameter or none; it chooses {inside} but not {outside}")
        result.append(Choice(parameter, list(places.values())))
    if not result:
        classes = ", ".join(f"nn.{cls.__name__}" for cls in LINEAR_MAPS)
        meant = (
            "a function that chooses other parameters" if match is None or isinstance(match, str) else "one that chooses any"
        )
        raise ValueError(
            f"match must choose a parameter; {match!r} chooses none. None and patterns mean {classes}: pass {meant}"
        )
    return result


def is_meant(place: Place, match: Match, parameter: Parameter) -> bool:
    """Whether `match` chooses this place of `parameter`."""
    if match is None or isinstance(match, str):
        is_weight = isinstance(place.module, LINEAR_MAPS) and place.attribute == "weight"
        return is_weight and (match is None or fnmatchcase(place.name, match))
    return bool(match(place.name, parameter))


def _places(model: nn.Module) -> list[tuple[Parameter, list[Place]]]:
    found: dict[int, tuple[Parameter, list[Place]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(id(parameter), (parameter, []))[1].append(Place(module, attribute, name))
    return list(found.values())
