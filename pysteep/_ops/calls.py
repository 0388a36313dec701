"""From tensors of any kind to calls of a home: picks the backend, groups and lays out, hands numbers to the right device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels.rounding import NEAREST, Rounding
from .dispatch import Choice, choose, extension
from .layout import Role, buckets
from .options import on

if extension is not None:
    from .native.tensors import described, plain

NATIVE = ("cpp", "cuda")
CPU = torch.device("cpu")
Arrange = Callable[[list[list[Tensor]]], tuple[Any, ...]]


@dataclass
class Call:
    """One call of a home: `getattr(home, op)(*operands, rounding=rounding, **options)`, then `finish()`."""

    device: torch.device
    home: ModuleType
    operands: tuple[Any, ...]
    indices: Sequence[int]
    rounding: Rounding
    finish: Callable[[], None] = lambda: None
    held: Sequence[Role] = ()  # the tensors whose addresses are operands: a gradient may have been made for this call alone


def calls(
    op: str,
    roles: Sequence[Role],
    backend: Choice,
    arrange: Arrange = tuple,
    numbers: Sequence[int] | None = None,
    rounding: Rounding = NEAREST,
    compensations: int = 0,
    extra: tuple[Any, ...] = (),
) -> list[Call]:
    """The calls that serve `roles`, the weights first; raises before anything is written.

    `arrange` makes a home's operands of the tensors by role; the extension takes them described, and `extra`, what their
    description does not say. `numbers` are what errors call the tensors by. The last `compensations` roles become those of the
    call's rounding, whose other lists have an entry for each weight.
    """
    count = len(roles[0].tensors)
    if extension is not None and backend in (None, *NATIVE):
        tensors = plain([role.tensors for role in roles], compensations)
        if tensors is not None and _alike(roles, tensors):
            device = torch.device("cuda", tensors.device_index) if tensors.on_cuda else CPU
            chosen = choose(backend, device, op, rounding.mode)
            if chosen.name in NATIVE:
                of_call = rounding_on(rounding, device) if rounding.mode == "stochastic" else rounding
                return [Call(device, chosen.home(op), (tensors, *extra), range(count), of_call, held=roles)]
    result = []
    for bucket, indices in buckets(roles, numbers):
        chosen = choose(backend, bucket.device, op, rounding.mode)
        of_call = rounding_on(rounding, bucket.device, indices)
        if chosen.name in NATIVE:
            operands: tuple[Any, ...] = (described(bucket.roles), *extra)
        else:
            end = len(roles) - compensations
            operands = arrange(bucket.roles[:end])
            of_call = of_call._replace(compensations=bucket.roles[end:])
        result.append(Call(bucket.device, chosen.home(op), operands, indices, of_call, bucket.finish))
    return result


def rounding_on(rounding: Rounding, device: torch.device, indices: Sequence[int] | None = None) -> Rounding:
    """That of a call on `device` whose tensors are those at `indices`, by default all."""
    if rounding.mode != "stochastic":
        return rounding
    rounding = rounding._replace(step=on(rounding.step, device, "step"))
    if indices is None:
        return rounding
    streams, firsts = ([values[i] for i in indices] for values in (rounding.streams, rounding.firsts))
    return rounding._replace(streams=streams, firsts=firsts)


def _alike(roles: Sequence[Role], tensors: Any) -> bool:
    """Whether roles that must have one dtype have one."""
    seen: dict[str, int] = {}
    for role, dtype in zip(roles, tensors.dtypes, strict=True):
        if role.alike and seen.setdefault(role.alike, dtype) != dtype:
            return False
    return True
