"""steepest_step by the extension: "cpp" for CPU tensors, "cuda" for those on NVIDIA GPUs. Formula: kernels/reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _csrc
from ...kernels.number import Number
from ...kernels.rounding import Rounding
from .tensors import current, numbers, rounded, stream


def steepest_step(
    tensors: _csrc.Tensors,
    *,
    lr: Number,
    q: float,
    betas: tuple[Number, Number],
    weight_decay: float,
    coupled_weight_decay: float,
    maximize: bool,
    step_scale: Number,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding,
) -> None:
    """As kernels/reference/steepest_step.py, on weights, gradients and, with momentum, momenta."""
    beta1, beta2, *scalars = numbers(*betas, lr, step_scale, grad_scale, found_inf)
    options = _csrc.SteepestOptions(q, beta1, beta2, weight_decay, coupled_weight_decay, maximize, *scalars)
    if tensors.on_cuda:
        with current(tensors.device_index):
            _csrc.steepest_step_cuda(tensors, options, rounded(rounding), stream(tensors.device_index))
    else:
        _csrc.steepest_step_cpu(tensors, options, rounded(rounding))


def steepest_power_sum(
    tensors: _csrc.Tensors,
    *,
    q: float,
    betas: tuple[Number, Number],
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    rounding: Rounding,
) -> Tensor:
    """As kernels/reference/steepest_step.py."""
    beta1, beta2, *scalars = numbers(*betas, 0.0, 1.0, grad_scale, 0.0)
    options = _csrc.SteepestOptions(q, beta1, beta2, 0.0, coupled_weight_decay, maximize, *scalars)
    if tensors.on_cuda:
        with current(tensors.device_index):
            sums = torch.zeros(_csrc.CUDA_PARTIAL_SUMS, dtype=torch.float64, device=torch.device("cuda", tensors.device_index))
            at = stream(tensors.device_index)
            _csrc.steepest_power_sum_cuda(tensors, options, rounded(rounding), sums.data_ptr(), at)
            return sums.sum()
    return torch.tensor(_csrc.steepest_power_sum_cpu(tensors, options, rounded(rounding)), dtype=torch.float64, device="cpu")
