"""Clipping by the norm of all gradients, as a factor of the gradients in the pass of the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._numbers import is_finite
from ..kernels.number import Number


def check_norms(total_norm: Number | None, max_norm: float | None) -> None:
    """Raise ValueError that names the argument, its value and what is allowed."""
    if (total_norm is None) != (max_norm is None):
        name, value = ("total_norm", max_norm) if total_norm is None else ("max_norm", total_norm)
        raise ValueError(f"{name} must be given where the other norm is; got {value!r} alone")
    if max_norm is not None and not (_is_norm(max_norm) and max_norm > 0):
        raise ValueError(f"max_norm must be a number > 0; got {max_norm!r}")
    if isinstance(total_norm, Tensor):
        if total_norm.numel() != 1:
            raise ValueError(f"total_norm must be a number or a tensor of one element; got shape {tuple(total_norm.shape)}")
    elif total_norm is not None and not _is_norm(total_norm):
        raise ValueError(f"total_norm must be a number or a tensor of one element; got {total_norm!r}")
    elif total_norm is not None and total_norm < 0:
        raise ValueError(f"total_norm must be >= 0; got {total_norm!r}")


def _is_norm(value: Any) -> bool:
    """A number that a float holds, inf and NaN with the floats."""
    return isinstance(value, (float, np.floating)) or is_finite(value)


def clipping_scale(total_norm: Number, max_norm: float, grad_scale: Tensor | None) -> Tensor:
    """What gradients are divided by to be clipped, and by `grad_scale`, which is in the norm too: a tensor of one element.

    As torch.nn.utils.clip_grad_norm_: times min(1, max_norm / (norm + 1e-6)).
    """
    if isinstance(total_norm, Tensor):
        norm = total_norm.detach().double()
    else:
        norm = torch.as_tensor(float(total_norm), dtype=torch.float64, device="cpu")
    scale = torch.ones_like(norm) if grad_scale is None else grad_scale.to(norm.device).double()
    coefficient: Tensor = (float(max_norm) / (norm / scale + 1e-6)).clamp(max=1.0)
    return scale / coefficient
