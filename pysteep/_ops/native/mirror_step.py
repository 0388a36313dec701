"""mirror_step by the extension: "cpp" for CPU tensors, "cuda" for those on NVIDIA GPUs. Formula: kernels/reference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _csrc
from ...kernels.number import Number
from ...kernels.rounding import Rounding
from .tensors import current, numbers, rounded, stream


def mirror_step(
    tensors: _csrc.Tensors,
    balances: Sequence[Tensor],
    *,
    depth: int,
    lr: Number,
    q: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding,
) -> None:
    """As kernels/reference/mirror_step.py, on weights and gradients."""
    scalars = numbers(lr, 1.0, grad_scale, found_inf)
    options = _csrc.SteepestOptions(q, 0.0, 0.0, weight_decay, 0.0, maximize, *scalars)
    addresses = [balance.data_ptr() for balance in balances]
    if tensors.on_cuda:
        with current(tensors.device_index):
            at = stream(tensors.device_index)
            _csrc.mirror_step_cuda(tensors, addresses, depth, options, rounded(rounding), at)
    else:
        _csrc.mirror_step_cpu(tensors, addresses, depth, options, rounded(rounding))
