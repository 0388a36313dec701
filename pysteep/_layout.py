"""Any tensors, made into what every home takes: flat blocks of memory, grouped by device and dtypes.

A home gets lists in which the weight, gradient and momentum of a tensor are dense and share one memory layout, each list of one
dtype: gradient and momentum in the weight's dtype or in the one it computes in. What is laid out or stored otherwise is copied
first and, where it was to be written, copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Bucket:
    """Tensors that one call of a home takes. `write_back` holds (the caller's tensor, the copy that was updated)."""

    device: torch.device
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor] | None = None
    write_back: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the updated copies to the tensors that the caller gave."""
        for target, source in self.write_back:
            target.copy_(source)


def buckets(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], momenta: Sequence[Tensor] | None) -> list[Bucket]:
    """Group and lay out; a gradient that is None leaves its tensor out. Raises before anything is written.

    Raises:
        TypeError: a tensor is sparse, of integer dtype, or a subclass without memory of its own.
        ValueError: shapes or devices differ within a tensor's weight, gradient and momentum, or its elements overlap.
    """
    found: dict[tuple[object, ...], Bucket] = {}
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        if gradient is None:
            continue
        momentum = None if momenta is None else momenta[i]
        w, g, m, written = weight, gradient, momentum, _NOTHING
        if not (_is_plain(w, g) and (m is None or _is_plain(w, m))):
            _check(i, weight, gradient, momentum)
            w, g, m, written = _copied_as_needed(weight, gradient, momentum)
        if w.numel() == 0:
            continue
        key = (w.device, w.dtype, g.dtype, None if m is None else m.dtype)
        bucket = found.get(key)
        if bucket is None:
            bucket = found[key] = Bucket(w.device, momenta=None if m is None else [])
        bucket.weights.append(w)
        bucket.gradients.append(g)
        if m is not None and bucket.momenta is not None:
            bucket.momenta.append(m)
        bucket.write_back += written
    return list(found.values())


_NOTHING: list[tuple[Tensor, Tensor]] = []


def _is_plain(weight: Tensor, other: Tensor) -> bool:
    """Whether both can go to a home as they are. Asked for each tensor at each step, and almost always so: hence first."""
    return (
        type(weight) in (Parameter, Tensor)
        and type(other) in (Parameter, Tensor)
        and other.dtype is weight.dtype
        and weight.dtype in FLOATING
        and other.layout is torch.strided
        and weight.is_contiguous()
        and other.is_contiguous()
        and other.shape == weight.shape
        and other.device == weight.device
        and not (other.is_neg() or weight.is_neg())
    )


def _copied_as_needed(
    weight: Tensor, gradient: Tensor, momentum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
    written: list[tuple[Tensor, Tensor]] = []
    w = _flat(_real(weight), weight, written)
    accepted = (w.dtype, torch.float64 if w.dtype == torch.float64 else torch.float32)
    g, m = _like(w, _real(gradient), accepted), None
    if momentum is not None:
        m = _like(w, _real(momentum), accepted)
        if m.data_ptr() != momentum.data_ptr():
            written.append((_real(momentum), m))
    return w, g, m, written


def _check(i: int, weight: Tensor, gradient: Tensor, momentum: Tensor | None) -> None:
    for role, tensor in (("param", weight), ("gradient", gradient), ("momentum", momentum)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{role} {i} must be a torch.Tensor; got {tensor!r}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{role} {i} must be dense (torch.strided); got {tensor.layout}: call .to_dense() on it")
        if is_traceable_wrapper_subclass(tensor) or isinstance(tensor, FakeTensor):
            raise TypeError(f"{role} {i} must hold its own memory; got a {type(tensor).__name__}")
        if tensor.dtype not in FLOATING and not tensor.is_complex():
            raise TypeError(f"{role} {i} must be float16, bfloat16, float32, float64 or complex; got {tensor.dtype}")
        if tensor.is_complex() != weight.is_complex():
            raise TypeError(f"{role} {i} must be complex if and only if its param is; got {tensor.dtype} for {weight.dtype}")
        if tensor.shape != weight.shape:
            raise ValueError(f"{role} {i} must have its param's shape {tuple(weight.shape)}; got {tuple(tensor.shape)}")
        if tensor.device != weight.device:
            raise ValueError(f"{role} {i} must be on its param's device {weight.device}; got {tensor.device}")


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones; a lazy conjugate or minus sign carried out."""
    tensor = tensor.detach().resolve_neg()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _strides(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions longer than 1, the innermost first."""
    return sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _flat(real: Tensor, weight: Tensor, written: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`real` itself if it fills its memory, else a contiguous copy, noted in `written`."""
    filled, reach, dense = 1, 0, True
    for stride, size in _strides(real):
        if stride <= reach:
            raise ValueError(
                f"a param's elements must not share memory; got shape {tuple(weight.shape)} with strides {weight.stride()}"
            )
        dense = dense and stride == filled
        filled, reach = filled * size, reach + stride * (size - 1)
    own = weight if not weight.is_complex() else torch.view_as_real(weight.detach())
    if dense and real.data_ptr() == own.data_ptr():
        return real
    copy = real.contiguous() if not real.is_contiguous() else real.clone()
    written.append((own.detach(), copy))
    return copy


def _like(weight: Tensor, tensor: Tensor, accepted: tuple[torch.dtype, torch.dtype]) -> Tensor:
    """`tensor` itself if it is laid out as `weight` and of an accepted dtype, else such a copy."""
    dtype = tensor.dtype if tensor.dtype in accepted else accepted[1]
    same = tensor.dtype == dtype and all(
        a == b or size == 1 for a, b, size in zip(tensor.stride(), weight.stride(), weight.shape, strict=True)
    )
    if same:
        return tensor
    return torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=weight.device).copy_(tensor)
