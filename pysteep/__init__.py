"""pysteep: steepest descent with two knobs, geometry q and depth L, each step one pass over memory, on any machine."""

from . import _ops, functional
from ._dispatch import Backend, backends, serving
from .optim import SteepestDescent

__all__ = ["Backend", "SteepestDescent", "backends", "functional", "serving"]
__version__ = "0.1.0"
