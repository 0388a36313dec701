"""Any tensors, made into what every home takes: flat blocks of memory, grouped by device and dtypes.

A home gets lists, one for each role (the weights, their gradients, what else an op takes), in which the tensors at one index
are dense and share one memory layout, each list of one dtype: the weight's or the one that it computes in. What is laid out or
stored otherwise is copied first and, where it was to be written, copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Role(NamedTuple):
    """Tensors that play one part in an op; `alike` names roles that must have one dtype within a call.

    `dtype`: the one that all must have, where it is not a floating one.
    """

    name: str
    tensors: Sequence[Tensor]
    written: bool = False
    alike: str = ""
    dtype: torch.dtype | None = None


@dataclass
class Bucket:
    """Tensors that one call of a home takes. `write_back` holds (the caller's tensor, the copy that was updated)."""

    device: torch.device
    roles: list[list[Tensor]]
    write_back: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the updated copies to the tensors that the caller gave."""
        for target, source in self.write_back:
            target.copy_(source)


def buckets(roles: Sequence[Role], numbers: Sequence[int] | None = None) -> list[tuple[Bucket, list[int]]]:
    """Group and lay out: each bucket with the indices that it holds. The first role is that of the weights.

    Errors call the tensors at an index by its entry of `numbers`, or by the index.

    Raises (before anything is written):
        TypeError: a tensor is sparse, of integer dtype, or without memory of its own: a subclass, one whose storage was freed.
        ValueError: shapes or devices differ among the tensors at one index, or a written tensor's elements overlap.
    """
    columns = [role.tensors for role in roles]
    keys = _plain_keys(roles, columns)
    if len(set(keys)) == 1 and keys[0] is not None:  # almost always so
        return [(Bucket(columns[0][0].device, list(map(list, columns))), list(range(len(keys))))]
    found: dict[tuple[object, ...], tuple[Bucket, list[int]]] = {}
    for i, (key, tensors) in enumerate(zip(keys, zip(*columns, strict=True), strict=True)):
        given, written = tensors, _NOTHING
        if key is None:
            _check(numbers[i] if numbers else i, roles, tensors)
            if tensors[0].numel() == 0:
                continue
            given, written = _copied_as_needed(roles, tensors)
            key = (given[0].device, *(tensor.dtype for tensor in given))
        if key not in found:
            found[key] = Bucket(given[0].device, [[] for _ in roles]), []
        bucket, indices = found[key]
        for role, tensor in zip(bucket.roles, given, strict=True):
            role.append(tensor)
        bucket.write_back += written
        indices.append(i)
    return list(found.values())


_NOTHING: list[tuple[Tensor, Tensor]] = []
_TYPES = {Parameter, Tensor}
_DTYPE, _LAYOUT, _SHAPE, _DEVICE = map(attrgetter, ("dtype", "layout", "shape", "device"))


def _plain_keys(roles: Sequence[Role], columns: Sequence[Sequence[Tensor]]) -> list[tuple[object, ...] | None]:
    """For each index the device and dtypes of its tensors, one for each role, if they can go to a home as they are.

    Asked at each step, and almost always so: hence first, and of whole lists, a third of the time of asking each tensor.
    """
    if not all(set(map(type, own)) <= _TYPES and set(map(_LAYOUT, own)) <= {torch.strided} for own in columns):
        return [None] * len(columns[0])
    dtypes = [list(map(_DTYPE, own)) for own in columns]
    facts = [
        list(zip(map(_DEVICE, own), map(_SHAPE, own), map(Tensor.is_contiguous, own), map(Tensor.is_neg, own), strict=True))
        for own in columns
    ]
    fit = [
        dtype in FLOATING and contiguous and not negative
        for dtype, (_, _, contiguous, negative) in zip(dtypes[0], facts[0], strict=True)
    ]
    for role, own, own_dtypes, own_facts in zip(roles, columns, dtypes, facts, strict=True):
        addresses = map(Tensor.data_ptr, own)  # 0 of a tensor without elements or memory
        fit = [
            fits and dtype is (role.dtype or weight) and there == here and address != 0
            for fits, dtype, weight, there, here, address in zip(
                fit, own_dtypes, dtypes[0], own_facts, facts[0], addresses, strict=True
            )
        ]
    return [
        (device, *of_roles) if fits else None
        for fits, (device, *_), of_roles in zip(fit, facts[0], zip(*dtypes, strict=True), strict=True)
    ]


def is_unallocated(tensor: Tensor) -> bool:
    """Whether the tensor has elements but no memory: its storage was freed, or it is one of torch's stand-ins for a tensor."""
    return tensor.data_ptr() == 0 and tensor.numel() != 0 and not tensor.is_meta


def check_readable(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor is one of whose numbers NumPy can make an array."""
    _check_dense(name, tensor)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(f"{name} must not be a tensor inside torch.func, whose numbers cannot be read: use torch.autograd")
    if tensor.is_quantized:
        raise TypeError(f"{name} must not be quantized; got {tensor.dtype}: call .dequantize() on it")
    _check_plain(name, tensor)
    if tensor.is_meta or is_unallocated(tensor):
        raise TypeError(f"{name} must hold its own memory; got one on {tensor.device} that has none")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise TypeError(f"{name} must be dense (torch.strided); got a nested tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided); got {tensor.layout}: call .to_dense() on it")


def _check_plain(name: str, tensor: Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor) or isinstance(tensor, FakeTensor):
        raise TypeError(f"{name} must hold its own memory; got a {type(tensor).__name__}")


def _copied_as_needed(
    roles: Sequence[Role], tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor]]]:
    written: list[tuple[Tensor, Tensor]] = []
    weight = _flat(_real(tensors[0]), tensors[0], written)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    given, dtypes = [weight], _dtypes(roles, tensors, weight.dtype, compute)
    for role, tensor, dtype in zip(roles[1:], tensors[1:], dtypes, strict=True):
        if role.written:
            _check_overlap(role.name, _real(tensor), tensor)
        like = _like(weight, _real(tensor), dtype)
        if role.written and like.data_ptr() != tensor.data_ptr():
            written.append((_real(tensor), like))
        given.append(like)
    return tuple(given), written


def _dtypes(roles: Sequence[Role], tensors: Sequence[Tensor], weight: torch.dtype, compute: torch.dtype) -> list[torch.dtype]:
    """What a home takes each tensor but the weight in: its own dtype, or else the compute dtype, for all that must be alike."""
    own = [_real(tensor).dtype for tensor in tensors[1:]]
    kept = [dtype if dtype in (weight, compute, role.dtype) else compute for role, dtype in zip(roles[1:], own, strict=True)]
    groups: dict[str, set[torch.dtype]] = {}
    for role, dtype in zip(roles[1:], kept, strict=True):
        groups.setdefault(role.alike or role.name, set()).add(dtype)
    return [
        dtype if len(groups[role.alike or role.name]) == 1 else compute for role, dtype in zip(roles[1:], kept, strict=True)
    ]


def _check(i: int, roles: Sequence[Role], tensors: Sequence[Tensor]) -> None:
    weight = tensors[0]
    for role, tensor in zip(roles, tensors, strict=True):
        name = f"{role.name} {i}"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {tensor!r}")
        _check_dense(name, tensor)
        _check_plain(name, tensor)
        if role.dtype is not None and tensor.dtype != role.dtype:
            raise TypeError(f"{name} must be {role.dtype}; got {tensor.dtype}")
        if role.dtype is None and tensor.dtype not in FLOATING and not tensor.is_complex():
            raise TypeError(f"{name} must be float16, bfloat16, float32, float64 or complex; got {tensor.dtype}")
        if tensor.is_complex() != weight.is_complex():
            raise TypeError(f"{name} must be complex if and only if its param is; got {tensor.dtype} for {weight.dtype}")
        if tensor.shape != weight.shape:
            raise ValueError(f"{name} must have its param's shape {tuple(weight.shape)}; got {tuple(tensor.shape)}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on its param's device {weight.device}; got {tensor.device}")
        if is_unallocated(tensor):
            raise TypeError(f"{name} must hold its own memory; got a {type(tensor).__name__} that has none")


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones; a lazy conjugate or minus sign carried out."""
    tensor = tensor.detach().resolve_neg()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _strides(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions longer than 1, the innermost first."""
    return sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _check_overlap(name: str, real: Tensor, tensor: Tensor) -> None:
    reach = 0
    for stride, size in _strides(real):
        if stride <= reach:
            raise ValueError(
                f"a {name}'s elements must not share memory; got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        reach += stride * (size - 1)


def _flat(real: Tensor, weight: Tensor, written: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`real` itself if it fills its memory, else a contiguous copy, noted in `written`."""
    _check_overlap("param", real, weight)
    filled, dense = 1, True
    for stride, size in _strides(real):
        dense = dense and stride == filled
        filled *= size
    own = weight if not weight.is_complex() else torch.view_as_real(weight.detach())
    if dense and real.data_ptr() == own.data_ptr():
        return real
    copy = real.contiguous() if not real.is_contiguous() else real.clone()
    written.append((own.detach(), copy))
    return copy


def _like(weight: Tensor, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` itself if it is laid out as `weight` and of that dtype, else such a copy."""
    same = tensor.dtype == dtype and all(
        a == b or size == 1 for a, b, size in zip(tensor.stride(), weight.stride(), weight.shape, strict=True)
    )
    if same:
        return tensor
    return torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=weight.device).copy_(tensor)
