"""pysteep: an optimiser with two knobs, geometry q and depth L, whose every step is one pass over memory, on any machine."""

import importlib
from typing import Any

from . import functional
from ._ops.dispatch import Backend, backends, serving
from .factorize import check_optimizer, collapse, dense_state_dict, factorize, load_dense_state_dict
from .gradient_release import GradientRelease, gradient_release
from .optim import SteepestDescent
from .param_groups import ParamGroups, param_groups

__all__ = [
    "Backend",
    "GradientRelease",
    "ParamGroups",
    "SteepestDescent",
    "backends",
    "check_optimizer",
    "collapse",
    "dense_state_dict",
    "factorize",
    "functional",
    "gradient_release",
    "load_dense_state_dict",
    "param_groups",
    "serving",
]
__version__ = "0.1.0"

_MODULES = ("diagnostics", "flow", "theory", "vote")  # imported when they are asked for: they bring other packages along


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
