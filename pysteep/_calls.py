"""From tensors of any kind to calls of a home: picks the backend, groups and lays out, hands numbers to the right device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._dispatch import choose, extension
from ._layout import Role, buckets

if extension is not None:
    from ._native.tensors import described, plain

Number = float | Tensor
NATIVE = ("cpp", "cuda")
CPU = torch.device("cpu")
Arrange = Callable[[list[list[Tensor]]], tuple[Any, ...]]


@dataclass
class Call:
    """One call of a home: `getattr(home, op)(*operands, **options)`, then `finish()`."""

    device: torch.device
    home: ModuleType
    operands: tuple[Any, ...]
    indices: Sequence[int]
    finish: Callable[[], None] = lambda: None


def calls(
    op: str, roles: Sequence[Role], backend: str | None, arrange: Arrange = tuple, numbers: Sequence[int] | None = None
) -> list[Call]:
    """The calls that serve `roles`, the weights first; raises before anything is written.

    `arrange` makes a home's operands of the tensors by role; the extension takes them described. `numbers` are what errors call
    the tensors by.
    """
    count = len(roles[0].tensors)
    if extension is not None and backend in (None, *NATIVE):
        tensors = plain([role.tensors for role in roles])
        if tensors is not None and _alike(roles, tensors):
            device = torch.device("cuda", tensors.device_index) if tensors.on_cuda else CPU
            chosen = choose(backend, device.type)
            if chosen.name in NATIVE:
                return [Call(device, chosen.home(op), (tensors,), range(count))]
    result = []
    for bucket, indices in buckets(roles, numbers):
        chosen = choose(backend, bucket.device.type)
        operands = (described(bucket.roles),) if chosen.name in NATIVE else arrange(bucket.roles)
        result.append(Call(bucket.device, chosen.home(op), operands, indices, bucket.finish))
    return result


def _alike(roles: Sequence[Role], tensors: Any) -> bool:
    if not any(role.alike for role in roles):
        return True
    seen: dict[str, int] = {}
    dtypes = [(role.alike, dtype) for role, dtype in zip(roles, tensors.dtypes, strict=True) if role.alike]
    return all(seen.setdefault(group, dtype) == dtype for group, dtype in dtypes)


def on(value: Number, device: torch.device) -> Number:
    """A number for the kernels of `device`: read now if that costs no synchronisation with another device, else left there."""
    if not isinstance(value, Tensor):
        return float(value)
    if device.type == "cpu" or value.device.type == "cpu":
        return float(value)
    value = value.detach().to(device, non_blocking=True)
    return value if value.dtype in (torch.float32, torch.float64) else value.double()
