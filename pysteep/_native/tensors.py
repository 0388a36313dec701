"""torch tensors as the extension takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _csrc

CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # include/pysteep/tensors.h
_EXCHANGE_API = getattr(Tensor, "__dlpack_c_exchange_api__", None)


def plain(weights: list[Tensor], gradients: list[Tensor | None], momenta: list[Tensor]) -> _csrc.Tensors | None:
    """The lists as they are, if every tensor is plain enough for one call (see csrc/module.cpp): a fifth of Python's time."""
    return None if _EXCHANGE_API is None else _csrc.flat_tensors(_EXCHANGE_API, Tensor, weights, gradients, momenta)


def described(weights: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor] | None) -> _csrc.Tensors:
    """The lists of one bucket."""
    device, buffers = weights[0].device, momenta or ()
    roles = (weights, gradients, buffers)
    return _csrc.Tensors(
        [weight.data_ptr() for weight in weights],
        [gradient.data_ptr() for gradient in gradients],
        [buffer.data_ptr() for buffer in buffers],
        [weight.numel() for weight in weights],
        [CODES[role[0].dtype] if role else 0 for role in roles],
        device.type == "cuda",
        device.index or 0,
    )


def number(value: float | Tensor) -> float | tuple[int, int]:
    """A number, or the address and dtype of one that the op reads itself."""
    return (value.data_ptr(), CODES[value.dtype]) if isinstance(value, Tensor) else float(value)
