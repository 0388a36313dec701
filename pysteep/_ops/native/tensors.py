"""torch tensors as the extension takes them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from ... import _csrc
from ...kernels.number import Number
from ...kernels.rounding import MODES, Rounding

CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3, torch.int16: 4}  # include/pysteep/tensors.h
_EXCHANGE_API = getattr(Tensor, "__dlpack_c_exchange_api__", None)


def plain(roles: Sequence[Sequence[Tensor]], compensations: int) -> _csrc.Tensors | None:
    """The lists, if all tensors are plain enough for one call: csrc/python/tensors.cpp, a fifth of Python's time."""
    if _EXCHANGE_API is None:
        return None
    lists = [tensors if isinstance(tensors, list) else list(tensors) for tensors in roles]
    return _csrc.flat_tensors(_EXCHANGE_API, Tensor, lists, compensations)


def plain_gradients(params: list[Tensor]) -> tuple[list[Tensor | None], bool] | None:
    """As `_state.sharding.gradients_of`, if no tensor is of a subclass: a loop that hardly does more than read."""
    return _csrc.plain_gradients(Tensor, Parameter, Tensor.grad, Tensor.requires_grad, params)


def described(roles: Sequence[Sequence[Tensor]]) -> _csrc.Tensors:
    """The lists of one bucket, the weights first."""
    device = roles[0][0].device
    return _csrc.Tensors(
        [[tensor.data_ptr() for tensor in role] for role in roles],
        [weight.numel() for weight in roles[0]],
        [CODES[role[0].dtype] for role in roles],
        device.type == "cuda",
        device.index or 0,
    )


def number(value: Number) -> float | tuple[int, int]:
    """A number, or the address and dtype of one that the op reads itself."""
    return (value.data_ptr(), CODES[value.dtype]) if isinstance(value, Tensor) else float(value)


def numbers(*values: Number) -> Sequence[float | tuple[int, int]]:
    """Each as `number`; almost always they are floats already."""
    return values if set(map(type, values)) == {float} else tuple(map(number, values))  # type: ignore[return-value]


def current(index: int) -> AbstractContextManager[object]:
    """Make that GPU the current one; leave it alone if it already is."""
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def stream(index: int) -> int:
    """Of that GPU, the current one."""
    return torch.cuda.current_stream(index).cuda_stream


def rounded(rounding: Rounding) -> _csrc.Rounding:
    """As the extension takes it; compensations are among its tensors."""
    if rounding.mode == "nearest":
        return NEAREST
    mode, seed = MODES.index(rounding.mode), rounding.seed % 2**64
    return _csrc.Rounding(mode, seed, number(rounding.step), rounding.streams, rounding.firsts)


NEAREST = _csrc.Rounding(0, 0, 0.0, [], [])
