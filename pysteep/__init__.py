"""pysteep: an optimiser with two knobs, geometry q and depth L, whose every step is one pass over memory, on any machine."""

import importlib
from typing import TYPE_CHECKING, Any

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
if TYPE_CHECKING:
    from . import diagnostics as diagnostics
    from . import flow as flow
    from . import theory as theory
    from . import vote as vote
else:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
