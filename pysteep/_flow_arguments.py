"""Arguments of `flow`: arrays over a batch of runs, whole numbers, choices. Errors name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ._numbers import as_integer, holds_flag, is_number
from ._ops.layout import check_readable

Array = np.ndarray[Any, np.dtype[Any]]


def numbers(name: str, value: Any, least: float | None = None, most: float | None = None, *, above: bool = False) -> Array:
    array = _array(name, value)
    if array.dtype.kind not in "iuf" or holds_flag(value):
        raise TypeError(f"{name} must be a number or an array of numbers; got {value!r}")
    array = array.astype(np.float64)
    allowed = "a finite number" if least is None else f"a finite number {'>' if above else '>='} {least}"
    if most is not None:
        allowed = f"a number in [{least}, {most}]"
    wrong = ~np.isfinite(array)
    if least is not None:
        wrong |= array <= least if above else array < least
    if most is not None:
        wrong |= array > most
    if wrong.any():
        raise ValueError(f"{name} must be {allowed}; got {array[wrong].flat[0]}")
    return array


def integers(name: str, value: Any, least: int, most: int | None = None) -> Array:
    array = _array(name, value)
    if (array.dtype.kind not in "iu" and array.size) or holds_flag(value):
        raise TypeError(f"{name} must be an integer or an array of integers; got {value!r}")
    wrong = (array < least) | (array > (most if most is not None else np.iinfo(np.int64).max))
    if wrong.any():
        allowed = f"from {least} to {'2^63 - 1' if most is None else most}"
        raise ValueError(f"{name} must be an integer {allowed}; got {array[wrong].flat[0]}")
    return array.astype(np.int64)


def _array(name: str, value: Any) -> Array:
    """Of a number, an array, a tensor or anything to iterate over."""
    if isinstance(value, torch.Tensor):
        check_readable(name, value)
        if value.requires_grad and torch.is_grad_enabled():
            argument = name.rpartition(": ")[2]
            raise ValueError(
                f"{name} must not require a gradient, which runs do not have; got a tensor with requires_grad=True: pass "
                f"{argument}.detach()"
            )
        value = value.detach().cpu().resolve_conj()
        value = value.double() if value.is_floating_point() else value
        array = value.numpy()
    else:
        try:
            listed = isinstance(value, Iterable) and not isinstance(value, (np.ndarray, str))
            array = np.asarray(list(value) if listed else value)
        except ValueError:  # rows of several lengths
            raise TypeError(f"{name} must be a number or an array of numbers; got {value!r}") from None
    return np.array(array)


def check_not_empty(name: str, array: Array) -> None:
    if array.size == 0:
        raise ValueError(f"{name} must be a number or an array with an element; got an array of shape {array.shape}")


def integer(name: str, value: Any, least: int, otherwise: str = "") -> int:
    whole = as_integer(value)
    if whole is None or whole < least:
        raise ValueError(f"{name} must be an integer >= {least}{otherwise}; got {value!r}")
    return whole


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def device_of(value: Any) -> torch.device:
    """One on which torch can make tensors."""
    try:
        device = torch.device(value)
        if device.type != "meta":
            torch.empty(1, device=device)
            return device
        reason = "its tensors hold no numbers"
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # whatever torch's part for that device raises
        reason = str(error).partition("\n")[0]
    raise ValueError(f"simulate: device must be 'cpu' or a GPU's that torch sees here; got {value!r}: {reason}")


def betas_of(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"simulate: betas must be two numbers in [0, 1); got {betas!r}")
    return float(betas[0]), float(betas[1])


def records(steps: int, record: int | Sequence[int]) -> Array:
    steps = integer("simulate: steps", steps, 0)
    count = as_integer(record)
    if count is None:
        at = integers("simulate: record", record, 0, steps)
        return np.unique(np.append(at.reshape(-1), steps))
    if count < 1:
        raise ValueError(f"simulate: record must be an integer >= 1 or a sequence of steps; got {record}")
    return np.unique(np.linspace(0, steps, count + 1).round().astype(np.int64))
