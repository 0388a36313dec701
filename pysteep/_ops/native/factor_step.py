"""factor_step by the extension: "cpp" for CPU tensors, "cuda" for those on NVIDIA GPUs. Formula: kernels/reference."""

from __future__ import annotations

from ... import _csrc
from ...kernels.number import Number
from ...kernels.rounding import Rounding
from .tensors import current, numbers, rounded, stream


def factor_step(
    tensors: _csrc.Tensors,
    stored: int,
    *,
    depth: int,
    lr: Number,
    q: float,
    betas: tuple[Number, Number],
    weight_decay: float,
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding,
) -> None:
    """As kernels/reference/factor_step.py, on weights, gradients, the `stored` factors by index and, with momentum, momenta."""
    beta1, beta2, *scalars = numbers(*betas, lr, 1.0, grad_scale, found_inf)
    options = _csrc.SteepestOptions(q, beta1, beta2, weight_decay, coupled_weight_decay, maximize, *scalars)
    if tensors.on_cuda:
        with current(tensors.device_index):
            _csrc.factor_step_cuda(tensors, stored, depth, options, rounded(rounding), stream(tensors.device_index))
    else:
        _csrc.factor_step_cpu(tensors, stored, depth, options, rounded(rounding))
