"""pysteep: steepest descent from sign descent to gradient descent, each step one pass over memory, on any machine."""

from . import functional
from ._dispatch import Backend, backends, serving
from .optim import SteepestDescent

__all__ = ["Backend", "SteepestDescent", "backends", "functional", "serving"]
__version__ = "0.1.0"
