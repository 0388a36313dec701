"""What counts as a number, an integer, a flag or a function among arguments: NumPy's as Python's, but True is no number."""

from __future__ import annotations

import operator
import sys
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


def is_number(value: object) -> bool:
    """In this order, for isinstance of Real alone takes microseconds."""
    return type(value) is float or (type(value) is not bool and isinstance(value, (float, int, Real)))


LARGEST = sys.float_info.max


def is_finite(value: Any) -> bool:
    """Whether `value` is a number within the range of a float64."""
    if not is_number(value):
        return False
    if isinstance(value, np.floating):  # NumPy would cast what it is compared with to its own narrower type
        value = float(value)
    return bool(-LARGEST <= value <= LARGEST)


def as_integer(value: Any) -> int | None:
    """`value` as an int, None if it is no integer."""
    if isinstance(value, (bool, np.bool_, Tensor)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def holds_flag(values: object) -> bool:
    """Whether a list or tuple has True or False among its numbers, which NumPy takes for 1 and 0."""
    if isinstance(values, (list, tuple)):
        return any(map(holds_flag, values))
    return isinstance(values, (bool, np.bool_))


def check_flags(**flags: Any) -> None:
    """Raise ValueError unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must be True or False; got {value!r}")


def check_function(name: str, value: object) -> None:
    """Raise TypeError unless it can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function; got {value!r}")
